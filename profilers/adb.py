"""A device over ADB: commands with exit codes, files that arrive whole, a new connection after a cut.

`adb-shell` speaks the protocol, over TCP or USB. Where an adb server owns the device (it holds every USB device that it
sees, and paired Wi-Fi ones), connections go through the `adb` program.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from profilers.errors import DeviceError, FailedError

CONNECT_S, COMMAND_S = 20.0, 30.0
SILENCE_S = 10.0  #: in the middle of a file, after which the connection is given up
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  #: seconds, seconds, probes
RETRIES = 3  #: of a transfer that came out wrong, and of whatever a lost connection cut short
WAITS_S = (0.5, 2.0, 5.0)
Result = TypeVar("Result")


class LinkLost(Exception):
    """The connection ended, or said nothing for too long; what it was doing may be done again."""


class Link(Protocol):
    """A connection. Every method raises LinkLost where it breaks."""

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        """What the command writes, standard error included."""

    def send(self, data: bytes, path: str) -> None: ...

    def fetch(self, path: str) -> bytes: ...

    def close(self) -> None: ...


class ShellLink:
    """Directly to the device's daemon, by adb-shell."""

    def __init__(self, *, address: str = "", serial: str = "") -> None:
        try:
            from adb_shell import adb_device, exceptions
            from adb_shell.auth.sign_pythonrsa import PythonRSASigner
        except ImportError:
            raise DeviceError("phones need adb-shell: pip install 'amc-hw[adb]'") from None
        self._errors: tuple[type[BaseException], ...] = (OSError, *_exceptions(exceptions))
        self._refused = exceptions.PushFailedError
        signer = PythonRSASigner(*_keys())
        asked: list[Any] = []  # whether the phone's screen asks for its owner's consent
        try:
            if address:
                host, _, port = address.rpartition(":")
                transport = _socket(host, int(port))
                self._device: Any = adb_device.AdbDevice(transport, default_transport_timeout_s=CONNECT_S)
            else:
                self._device = adb_device.AdbDeviceUsb(serial=serial or None, default_transport_timeout_s=CONNECT_S)
            self._device.connect(rsa_keys=[signer], auth_timeout_s=CONNECT_S, auth_callback=asked.append)
        except exceptions.DeviceAuthError:
            raise DeviceError(_UNAUTHORIZED) from None
        except exceptions.InvalidTransportError:
            raise DeviceError("USB devices need libusb: pip install 'adb-shell[usb]', or start 'adb'") from None
        except self._errors as error:
            if asked:
                raise DeviceError(_UNAUTHORIZED) from None
            raise LinkLost(str(error) or type(error).__name__) from error

    def _guarded(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except self._errors as error:
            raise LinkLost(str(error) or type(error).__name__) from error

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        options = {"transport_timeout_s": timeout_s, "read_timeout_s": timeout_s, "decode": False}
        return bytes(self._guarded(lambda: self._device.shell(command, **options)))

    def send(self, data: bytes, path: str) -> None:
        options = {"transport_timeout_s": SILENCE_S, "read_timeout_s": SILENCE_S, "mtime": 1}
        try:
            self._guarded(lambda: self._device.push(io.BytesIO(data), path, **options))
        except LinkLost as lost:
            if isinstance(lost.__cause__, self._refused):
                raise DeviceError(f"the device refuses a file: {_text(lost.__cause__)}") from None
            raise

    def fetch(self, path: str) -> bytes:
        stream = io.BytesIO()
        options = {"transport_timeout_s": SILENCE_S, "read_timeout_s": SILENCE_S}
        self._guarded(lambda: self._device.pull(path, stream, **options))
        return stream.getvalue()

    def close(self) -> None:
        with suppress(*self._errors):
            self._device.close()


class ServerLink:
    """Through the adb server, by the `adb` program."""

    def __init__(self, serial: str) -> None:
        program = shutil.which("adb")
        if program is None:
            raise DeviceError(
                "no 'adb' program: install Android's platform-tools, or name an address such as HOST:5555"
            )
        self._command = [program, "-s", serial]
        state = self._run(["get-state"], timeout_s=CONNECT_S).decode(errors="replace").strip()
        if state != "device":
            raise DeviceError(_UNAUTHORIZED if "unauthorized" in state else f"device {serial} is {state or 'away'}")

    def _run(self, arguments: list[str], *, timeout_s: float) -> bytes:
        try:
            done = subprocess.run([*self._command, *arguments], capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LinkLost(f"no answer within {timeout_s:.0f} s") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            if any("unauthorized" in line for line in said):
                raise DeviceError(_UNAUTHORIZED)
            raise LinkLost(said[-1] if said else f"adb ended with {done.returncode}")
        return done.stdout

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        return self._run(["exec-out", command], timeout_s=timeout_s)

    def send(self, data: bytes, path: str) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            try:
                self._run(["push", file.name, path], timeout_s=_transfer_s(len(data)))
            except LinkLost as lost:
                if ": remote " in str(lost):
                    raise DeviceError(f"the device refuses a file: {lost}") from None
                raise

    def fetch(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            self._run(["pull", path, f"{folder}/file"], timeout_s=_transfer_s(0))
            return Path(folder, "file").read_bytes()

    def close(self) -> None:
        pass


_UNAUTHORIZED = "the device does not trust this computer yet: unlock its screen, accept the key, and run this again"


class AdbDevice:
    """A device that is connected when it is needed, and again after a cut.

    open_link: makes a connection. Commands that were cut are run again: they must be repeatable.
    """

    def __init__(
        self, name: str, open_link: Callable[[], Link], *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.name, self._open_link, self._sleep = name, open_link, sleep
        self._link: Link | None = None

    def _with_link(self, use: Callable[[Link], Result]) -> Result:
        last = ""
        for wait_s in (*WAITS_S, None):
            try:
                if self._link is None:
                    self._link = self._open_link()
                return use(self._link)
            except LinkLost as lost:
                last = " ".join(str(lost).split()) or "no reason given"
                self.close()
                if wait_s is not None:
                    self._sleep(wait_s)
        raise DeviceError(f"{self.name} cannot be reached ({last}): check the cable, the address and 'adb devices'")

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def try_run(self, command: str, *, timeout_s: float = COMMAND_S) -> tuple[int, str]:
        """(exit code, what it wrote). A reply without its end is a lost connection."""
        mark = f"amc-hw-{secrets.token_hex(8)}"

        def use(link: Link) -> tuple[int, str]:
            reply = link.shell(f"( {command}\n); echo {mark}:$?", timeout_s=timeout_s).decode(errors="replace")
            text, found, code = reply.replace("\r\n", "\n").rpartition(f"{mark}:")
            if not found or not code.strip().isdigit():
                raise LinkLost("a reply was cut short")
            return int(code), text

        return self._with_link(use)

    def run(self, command: str, *, timeout_s: float = COMMAND_S) -> str:
        """What the command wrote; DeviceError where it fails."""
        code, text = self.try_run(command, timeout_s=timeout_s)
        if code != 0:
            said = text.strip().splitlines()
            raise DeviceError(
                f"{self.name}: {command.split()[0]} ended with {code}: {said[-1] if said else 'no output'}"
            )
        return text

    def push(self, data: bytes, path: str, *, executable: bool = False) -> None:
        """Write a file, whole and with the right bytes or not at all."""
        part, whole, wanted = shlex.quote(f"{path}.part"), shlex.quote(path), hashlib.sha256(data).hexdigest()
        mode = f"chmod 755 {part}; " if executable else ""
        moved = (  # repeatable: what moved the file may have been cut before it could say so
            f'case "$(sha256sum < {part})" in {wanted}*) {mode}mv -f {part} {whole} ;; esac; '
            f'case "$(sha256sum < {whole})" in {wanted}*) ;; *) exit 1 ;; esac'
        )
        for _ in range(RETRIES):
            self._with_link(lambda link: link.send(data, f"{path}.part"))
            if self.try_run(moved)[0] == 0:
                return
        self.try_run(f"rm -f {part}")
        _, room = self.try_run(f"df -h {shlex.quote(str(Path(path).parent))} | tail -1")
        raise DeviceError(f"{self.name}: {path} does not arrive whole; is the device full? ({room.strip()[:80]})")

    def pull(self, path: str) -> bytes:
        """A file's bytes, the same as on the device; DeviceError where it is not there."""
        for _ in range(RETRIES):
            wanted = self._checksum(path)
            if wanted is None:
                raise DeviceError(f"{self.name}: there is no {path}")
            data = self._with_link(lambda link: link.fetch(path))
            if hashlib.sha256(data).hexdigest() == wanted:
                return data
        raise DeviceError(f"{self.name}: {path} does not come back whole after {RETRIES} tries: check the cable")

    def _checksum(self, path: str) -> str | None:
        code, text = self.try_run(f"sha256sum < {shlex.quote(path)}")
        word = text.split()[:1]
        return word[0] if code == 0 and word and len(word[0]) == 64 else None


def _socket(host: str, port: int) -> Any:
    """adb-shell's connection, with what it lacks: it waits for more from a connection that has ended, and leaves out
    what did not fit into one write. A peer that vanished is noticed by keep-alive, also in a long silence."""
    from adb_shell.transport.tcp_transport import TcpTransport

    class Socket(TcpTransport):  # type: ignore[misc]
        def connect(self, transport_timeout_s: float) -> None:
            super().connect(transport_timeout_s)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                if hasattr(socket, option):
                    self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

        def bulk_read(self, numbytes: int, transport_timeout_s: float) -> bytes:
            data: bytes = super().bulk_read(numbytes, transport_timeout_s)
            if numbytes and not data:
                raise ConnectionResetError("the device ended the connection")
            return data

        def bulk_write(self, data: bytes, transport_timeout_s: float) -> int:
            sent = 0
            while sent < len(data):
                sent += super().bulk_write(data[sent:], transport_timeout_s)
            return sent

    return Socket(host, port)


def _transfer_s(size: int) -> float:
    return COMMAND_S + size / 200_000


def _text(error: BaseException) -> str:
    """What the daemon said, which comes as bytes."""
    said = error.args[0] if error.args else ""
    return said.decode(errors="replace") if isinstance(said, bytes | bytearray) else str(said)


def _exceptions(module: Any) -> tuple[type[Exception], ...]:
    """Everything that adb-shell raises of its own."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    return tuple(found)


def _keys() -> tuple[str, str]:
    """(public, private) key of this user, made at first use: private to them."""
    from adb_shell.auth.keygen import keygen

    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "amc-hw"
    private, public = folder / "adbkey", folder / "adbkey.pub"
    try:
        if not (private.exists() and public.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            before = os.umask(0o077)
            try:
                keygen(str(private))
            finally:
                os.umask(before)
            private.chmod(0o600)
        return public.read_text(), private.read_text()
    except OSError as error:
        raise FailedError(f"cannot keep the ADB key in {folder}: {error.strerror}") from error


def on_usb() -> list[str]:
    """Serials of devices on USB; empty without libusb."""
    try:
        from adb_shell.transport.usb_transport import UsbTransport

        return [str(device.serial_number) for device in UsbTransport.find_all_adb_devices()]
    except Exception:  # libusb that is not there, or may not, fails in many ways
        return []


def attached() -> list[str]:
    """Serials that the adb server knows; empty without one."""
    program = shutil.which("adb")
    if program is None:
        return []
    try:
        done = subprocess.run([program, "devices"], capture_output=True, text=True, timeout=CONNECT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    _, _, listed = done.stdout.partition("List of devices attached")  # a server that is only started says so before
    return [line.split()[0] for line in listed.splitlines() if line.strip() and not line.startswith("*")]


def open_device(name: str, *, address: str = "", serial: str = "") -> AdbDevice:
    """The device at an address (HOST:PORT), or of a serial, or the only one there is.

    ANDROID_SERIAL stands in where neither is given. DeviceError where several are attached and none is named, or none.
    """
    serial = serial or ("" if address else os.environ.get("ANDROID_SERIAL", ""))
    known = attached()
    if ":" in serial and not address and serial not in known:
        address, serial = serial, ""
    if address in known:  # its server owns the connection
        address, serial = "", address
    if address:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise DeviceError(f"device {name}: address {address!r} is not HOST:PORT, such as 192.168.1.20:5555")
        return AdbDevice(f"{name} at {address}", lambda: ShellLink(address=address))
    there = [serial] if serial else known or on_usb()
    if len(there) > 1:
        raise DeviceError(f"several devices are attached ({', '.join(there)}): give --serial, or ANDROID_SERIAL")
    if there:
        (found,) = there
        direct = found not in known
        return AdbDevice(f"{name} ({found})", lambda: ShellLink(serial=found) if direct else ServerLink(found))
    raise DeviceError(
        f"{name}: no device is attached. On the phone: Settings, About, tap 'Build number' seven times; then System, "
        "Developer options, switch on 'USB debugging'; plug it in, accept the key on its screen, check 'adb devices'"
    )
