"""Files that hold images, on this machine or behind a URL: which they are, what is in them, and reading a part of one.

A tar or zip file is read in place: an `Index` says where each member begins, so that images can be asked for in any
order. Places with a scheme of `REMOTE_PACKAGES`, such as s3://, are read through fsspec. Nothing that is kept here
holds an open file, so that data sets can be handed to other processes; each process opens what it reads.
"""

import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

from utils import UserError, locked, replacing

logger = logging.getLogger("archives")

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------- places

REMOTE_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "hdfs": "pyarrow",
    "sftp": "paramiko",
    "memory": "fsspec",
}
"""Schemes of places that are read through fsspec, and the package that it needs for each."""
RETRY_S = (1.0, 4.0, 15.0, 60.0)
"""Waits between attempts to read from a place that does not answer; the packages themselves have tried by then."""
REMOTE_BLOCK = 8 * 2**20
"""Bytes that are read ahead while a remote archive is indexed: members smaller than it cost no request of their own."""
INDEX_THREADS = 16
MOST_PLACES = 1_000_000
"""Names that braces may stand for."""


def is_remote(place: str) -> bool:
    """Whether a place is a URL that is read through fsspec."""
    return place.partition("://")[0] in REMOTE_PACKAGES and "://" in place


def expand_braces(text: str) -> list[str]:
    """The names that a text with braces stands for: `{000..099}` counts, with as many digits, `{a,b}` lists.

    Raises: ValueError for braces that hold something else, or too many names.
    """
    pieces, choices = re.split(r"(\{[^{}]*\})", text), []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            if "{" in piece or "}" in piece:
                raise ValueError("has a brace without its partner")
            choices.append([piece])
        elif found := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            first, last = map(int, found.groups())
            if first > last:
                raise ValueError(f"{piece} counts down; write the smaller number first")
            if last - first >= MOST_PLACES:
                raise ValueError(f"{piece} stands for more than {MOST_PLACES:,} names")
            digits = len(found[1]) if found[1].startswith("0") else 0
            choices.append([f"{each:0{digits}d}" for each in range(first, last + 1)])
        elif "," in piece:
            choices.append(piece[1:-1].split(","))
        else:
            raise ValueError(f"{piece} is neither {{000..099}} nor {{a,b}}")
    if np.prod([float(len(each)) for each in choices]) > MOST_PLACES:
        raise ValueError(f"stands for more than {MOST_PLACES:,} names")
    return ["".join(parts) for parts in itertools.product(*choices)]


ARCHIVE = re.compile(r"\.(tar|zip)$", re.IGNORECASE)
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2?|xz|zstd?|lz4?|lzma|lzo|z|br)|tgz|tbz2?|txz|tzst|7z|rar)$", re.IGNORECASE)


def split_place(place: str) -> tuple[str, str] | None:
    """A place as an archive and a folder within it, which may be empty; None if it names no archive.

    `/data/all.tar/train` is the folder train in /data/all.tar, unless there is a folder of that name.

    Raises: ValueError if it names an archive that is compressed as a whole.
    """
    parts = place.split("/")
    for number, part in enumerate(parts):
        path = "/".join(parts[: number + 1])
        name = part.partition("?")[0] if is_remote(place) else part
        if not ARCHIVE.search(name) and not COMPRESSED.search(name):
            continue
        if not is_remote(place) and Path(path).is_dir():
            continue
        if COMPRESSED.search(name):
            raise ValueError(compressed(path))
        return (place, "") if "?" in part else (path, "/".join(parts[number + 1 :]).strip("/"))
    return None


def compressed(path: str) -> str:
    """What is wrong with an archive that is compressed as a whole, and the remedy."""
    return (
        f"{path} is compressed as a whole, so no image in it can be read without all before it; unpack it once, for "
        "example with gunzip or unzstd, to a .tar (compressing images again saves next to nothing)"
    )


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive, one that is compressed as a whole included."""
    return bool(ARCHIVE.search(name) or COMPRESSED.search(name))


def follows_to(is_kind: Callable[[], bool]) -> bool:
    """Whether a path leads to something of a kind, links being followed."""
    try:
        return is_kind()
    except OSError:  # a link to itself
        return False


def folders_below(root: Path) -> Iterator[tuple[bytes, int, list[os.DirEntry[bytes]]]]:
    """A folder and those below it: path relative to it, modification time in ns, and what is in it beside folders.

    Links to folders are followed, but each folder is given once, by its own path where it has one. Those whose names
    start with a dot are skipped.

    Raises: OSError if one cannot be listed.
    """
    visited: set[tuple[int, int]] = set()
    pending, links = [(b"", False)], list[bytes]()
    while pending or links:
        if not pending:
            pending, links = [(link, False) for link in reversed(links)], []
        folder, is_link = pending.pop()
        if is_link:  # whatever is in a folder itself is found there
            links.append(folder)
            continue
        full = os.path.join(os.fsencode(root), folder)  # noqa: PTH118  # pathlib takes no bytes, and is slow
        status = os.stat(full)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(full) as entries:
            inside = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        prefix = folder + b"/" if folder else b""
        folders = [entry for entry in inside if not entry.name.startswith(b".") and follows_to(entry.is_dir)]
        below = {entry.name for entry in folders}
        yield folder, status.st_mtime_ns, [entry for entry in inside if entry.name not in below]
        # Reversed, since the last one is taken first.
        pending += [(prefix + entry.name, entry.is_symlink()) for entry in reversed(folders)]


def archives_below(root: Path) -> list[str]:
    """The files below a folder that `is_archive` is true of, by their sorted paths; what is hidden does not count."""
    found = []
    for folder, _, files in folders_below(root):
        for entry in files:
            name = os.fsdecode(entry.name)
            if not name.startswith(".") and is_archive(name) and follows_to(entry.is_file):
                found.append(root / os.fsdecode(folder) / name)
    return [str(path) for path in sorted(found)]


# --------------------------------------------------------------------------------------- files and their bytes


class _Descriptor:
    """An open file of this process, closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=256)  # well below the files that a process may have open
def _opened(path: str, _version: str, _process: int) -> _Descriptor:
    return _Descriptor(path)


@dataclass(frozen=True)
class StoredFile:
    """A file that is read in parts, as it was when it was first looked at."""

    place: str
    """Path or URL, for messages too."""
    size: int
    version: str
    """Changes with the content, as far as its place tells."""
    copy: str | None = None
    """Path of a copy on this machine, if there is one; it has a version of its own."""
    copy_version: str = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.place.partition("?")[0].rpartition("/")[2] if is_remote(self.place) else Path(self.place).name

    def read(self, start: int, length: int) -> bytes:
        """So many bytes from `start` on.

        Raises: OSError if there are less; UserError if the place does not answer, or the file has changed.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise OSError(f"{self.place} ends at byte {self.size:,}, before byte {start + length:,}")
        if self.copy is None and is_remote(self.place):
            data = asked(self.place, lambda system, path: system.cat_file(path, start=start, end=start + length))
            if len(data) != length:
                raise UserError(
                    f"{self.place}: {length:,} bytes were asked for and {len(data):,} came: the server does not give "
                    "parts of files; copy it to a disk, or give cache='/folder' (README, Where images come from)"
                )
            return data
        path, version = (self.place, self.version) if self.copy is None else (self.copy, self.copy_version)
        # No position is shared between processes or threads: pread is told where to read.
        descriptor = _opened(path, version, os.getpid())
        status = os.fstat(descriptor.number)
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, version):
            raise UserError(f"{path} has changed since it was opened; leave it alone while it is read, and start again")
        data = b""
        while len(data) < length:
            part = os.pread(descriptor.number, length - len(data), start + len(data))
            if not part:
                raise OSError(f"{path} ends at byte {start + len(data):,}, it had {self.size:,}")
            data = data + part if data else part
        return data

    def stream(self) -> BinaryIO:
        """It as an open file, for reading from start to end with jumps."""
        block = REMOTE_BLOCK if self.copy is None and is_remote(self.place) else 2**16
        return io.BufferedReader(_Parts(self), block)


class _Parts(io.RawIOBase):
    def __init__(self, file: StoredFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.file.size - self.position))
        if length:
            buffer[:length] = self.file.read(self.position, length)
        self.position += length
        return length


def stored_file(place: str, copies: Path | None = None) -> StoredFile:
    """Look at a file.

    Args:
        place: path, or URL with a scheme of `REMOTE_PACKAGES`.
        copies: folder to which remote files are copied, whole, where they are not there yet; None to read in place.

    Raises: OSError if it is not there; UserError if a remote place does not answer.
    """
    if not is_remote(place):
        status = Path(place).stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{place} is not a regular file")
        return StoredFile(place, status.st_size, str(status.st_mtime_ns))
    about = asked(place, lambda system, path: system.info(path), waits_s=())
    if about.get("size") is None:
        raise UserError(f"{place}: the server does not say how large it is; copy it to a disk")
    file = StoredFile(place, int(about["size"]), version_of(about))
    return file if copies is None else copied(file, copies)


def version_of(about: dict[str, Any]) -> str:
    """What changes with a remote file's content, out of what fsspec knows of it; empty if it knows nothing."""
    names = ("ETag", "etag", "md5Hash", "Content-MD5", "crc32c", "mtime", "LastModified", "Last-Modified", "created")
    return next((f"{name} {about[name]}" for name in names if about.get(name) is not None), "")


def copied(file: StoredFile, copies: Path) -> StoredFile:
    """A remote file with its copy in a folder, which is made if it is not there; errors are those of `stored_file`."""
    copy = _copy_of(file, copies)
    return StoredFile(file.place, file.size, file.version, str(copy), str(copy.stat().st_mtime_ns))


def _copy_of(file: StoredFile, copies: Path) -> Path:
    # Not by fsspec's simplecache, which writes under the final name: another process would read half a file.
    digest = hashlib.blake2b(f"{file.place} {file.size} {file.version}".encode(), digest_size=16).hexdigest()
    copy = copies / f"{digest}-{file.name[-80:]}"
    if copy.is_file() and copy.stat().st_size == file.size:
        return copy
    copies.mkdir(parents=True, exist_ok=True)
    with locked(copies / f".lock-{digest}"):  # other ranks and workers wait here for the first
        if not copy.is_file() or copy.stat().st_size != file.size:
            logger.info("copying %s (%.1f MiB) to %s", file.place, file.size / 2**20, copies)
            with replacing(copy, shared=True) as temporary:
                asked(file.place, lambda system, path: system.get_file(path, str(temporary)))
                if temporary.stat().st_size != file.size:
                    raise UserError(f"{file.place} has changed while it was copied; start again")
    (copies / f".lock-{digest}").unlink(missing_ok=True)
    return copy


def read_whole(place: str, copies: Path | None = None, known: tuple[int, str] | None = None) -> bytes:
    """The content of a remote file.

    Args:
        place: its URL.
        copies: as for `stored_file`.
        known: size and version, where the place has told them; else it is asked for them before the copy is used.

    Raises: as `stored_file`.
    """
    if copies is None:
        return asked(place, lambda system, path: system.cat_file(path))
    file = stored_file(place, copies) if known is None else copied(StoredFile(place, *known), copies)
    return file.read(0, file.size)


def asked(place: str, ask: Callable[[Any, str], T], *, waits_s: Sequence[float] = RETRY_S) -> T:
    """What `ask(file system, path in it)` gives of a remote place; without an answer, asked again after each wait.

    An image that is not there is damage like any other. A place that cannot be reached is no property of the data, and
    stops who reads: skipping its images would make a run one that cannot be repeated.

    Raises: FileNotFoundError; UserError if a package or credentials are missing, or there is no answer.
    """
    for wait_s in (*waits_s, None):
        system, path = file_system(place)
        try:
            return ask(system, path)
        except _remote_errors() as raised:
            error = raised
            # fsspec says of any answer but the right one to a question over HTTP that the file is not there.
            if isinstance(raised, FileNotFoundError):
                cause = raised.__cause__
                if not isinstance(cause, _remote_errors()) or getattr(cause, "status", None) in (404, 410):
                    raise
                error = cause
            if _is_refusal(error):
                raise UserError(f"{place}: no access ({_words(error)}); {_how_to_get_access(place)}") from raised
            if wait_s is None or isinstance(error, ValueError):
                raise UserError(
                    f"{place}: cannot be read ({_words(error)}); check the address and the network, then start again"
                ) from raised
            logger.warning("%s: %s; asking again in %.0f s", place, _words(error), wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last attempt raises")


def file_system(place: str) -> tuple[Any, str]:
    """Fsspec's file system of a remote place, and the path in it. Raises: UserError if a package is missing."""
    import fsspec

    try:
        # fsspec keeps one for each process and thread, so that none crosses a fork.
        return fsspec.core.url_to_fs(place)
    except ImportError as error:
        package = REMOTE_PACKAGES[place.partition("://")[0]]
        remedy = "pip install -e '.[remote]'" if package in ("s3fs", "gcsfs", "aiohttp") else f"pip install {package}"
        raise UserError(f"{place}: needs the package {package}: {remedy}") from error


OTHER_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"),
                ("google.auth.exceptions", "GoogleAuthError"), ("gcsfs.retry", "HttpError"),
                ("aiohttp", "ClientError"))  # fmt: skip
"""Errors of the packages behind fsspec that are no OSErrors."""


def _remote_errors() -> tuple[type[Exception], ...]:
    loaded = [getattr(sys.modules.get(module), name, None) for module, name in OTHER_ERRORS]
    return (OSError, ValueError, *[kind for kind in loaded if kind is not None])


def _is_refusal(error: Exception) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    without = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "GoogleAuthError"}
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)  # pyright: ignore[reportAttributeAccessIssue]
    return bool(kinds & without) or str(status) in ("401", "403")


def _how_to_get_access(place: str) -> str:
    scheme = place.partition("://")[0]
    if scheme == "s3":
        return "log in (aws configure, AWS_PROFILE, AWS_ACCESS_KEY_ID), or FSSPEC_S3_ANON=true for a public bucket"
    if scheme in ("gs", "gcs"):
        return "log in (gcloud auth application-default login, GOOGLE_APPLICATION_CREDENTIALS), or FSSPEC_GS_TOKEN=anon"
    return "give fsspec the credentials, as its documentation says under Configuration, or use an address with access"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class RemoteFile(NamedTuple):
    """A file below a remote folder."""

    path: str
    """Relative to the folder."""
    size: int
    version: str


def files_below(place: str) -> list[RemoteFile]:
    """All files below a remote folder, by their sorted paths; what is hidden does not count.

    Raises: as `asked`.
    """
    found = asked(place, lambda system, path: (system.find(path, detail=True), path), waits_s=())
    listed, root = found[0], found[1].rstrip("/") + "/"
    files = []
    for full, about in listed.items():
        relative = full[len(root) :] if full.startswith(root) else None
        if relative and about.get("type") == "file" and not _is_hidden(relative):
            files.append(RemoteFile(relative, int(about.get("size") or 0), version_of(about)))
    return sorted(files)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


# -------------------------------------------------------------------------------------------------- archives


class Names(Protocol):
    """Says which names are those of images and counts the others: `sources.Endings`."""

    left_out: Counter[str]

    def is_image(self, name: str, is_file: Callable[[], bool]) -> bool:
        """Whether a file of this name, without its folder, is an image."""
        ...

    def is_array(self, name: str) -> bool:
        """Whether it is an image where there are no others."""
        ...


class Member(NamedTuple):
    """Where a member of an archive is, and how it is stored."""

    start: int
    """Byte at which its data begin in a tar file, its header in a zip file."""
    stored: int
    """Bytes of it in the archive."""
    method: int
    """That of zip, see `zipfile`; `IN_TAR` for a tar file."""
    size: int
    """Bytes of it when it is unpacked."""
    crc: int
    """Of a zip file's member, CRC-32 of its content."""


IN_TAR = -1
INDEX_FORMAT = 2
"""Of the indices that are kept; those of another one are made again."""


@dataclass(frozen=True)
class Members:
    """Some members of an archive, by their sorted names."""

    blob: np.ndarray
    """Bytes of all names, one after the other."""
    ends: np.ndarray
    """Where in these each name ends."""
    members: np.ndarray
    """int64, a row for each with the fields of `Member`."""


@dataclass(frozen=True)
class Index:
    """What is in an archive."""

    images: Members
    arrays: Members
    """Those that are images where there are no others."""
    left_out: dict[str, int]
    """Other members, counted by their endings."""


ARCHIVE_ERRORS = (
    tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError, LookupError, ArithmeticError, struct.error,
    zlib.error, NotImplementedError,
)  # fmt: skip
"""What reading the list of members of a damaged archive raises."""


class ArchiveError(Exception):
    """An archive that cannot be used, with the remedy."""


def index_all(files: Sequence[StoredFile], names: Callable[[], Names], key: str, cache: Path | None) -> list[Index]:
    """The index of each archive.

    Args:
        files: the archives.
        names: makes what says which members are images.
        key: changes with which these are.
        cache: folder in which indices are kept, each until its archive changes.

    Raises: ArchiveError naming the first archive that is cut short, damaged, encrypted or compressed as a whole.
    """
    with ThreadPoolExecutor(min(INDEX_THREADS, len(files))) as pool:
        return list(pool.map(lambda file: _index_cached(file, names, key, cache), files))


def _index_cached(file: StoredFile, names: Callable[[], Names], key: str, cache: Path | None) -> Index:
    if cache is None:
        return index(file, names())
    place = file.place if is_remote(file.place) else str(Path(file.place).resolve())
    request = os.fsencode(f"{place} {file.size} {file.version} {key} {INDEX_FORMAT}")
    digest = hashlib.blake2b(request, digest_size=16).hexdigest()
    path = cache / f"{digest}.npz"
    if (kept := _read_index(path)) is not None:
        return kept
    # A file that changes twice within the clock's resolution keeps its time, so recent changes are not cached.
    if not is_remote(file.place) and int(file.version) > time.time_ns() - 2_000_000_000:
        return index(file, names())
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".lock-{digest}"):  # the other ranks of this machine wait here for the first
            made = _read_index(path) or _keep_index(index(file, names()), path)
        (cache / f".lock-{digest}").unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the index of %s could not be kept: %s", file.place, error)
        return index(file, names())
    return made


def _read_index(path: Path) -> Index | None:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            images, arrays = (
                Members(*(stored[f"{kind}_{name}"] for name in ("blob", "ends", "members")))
                for kind in ("images", "arrays")
            )
            return Index(images, arrays, json.loads(stored["left_out"].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None  # no cache yet, or a damaged one


def _keep_index(made: Index, path: Path) -> Index:
    parts = {f"images_{name}": part for name, part in vars(made.images).items()}
    parts |= {f"arrays_{name}": part for name, part in vars(made.arrays).items()}
    with replacing(path, shared=True) as temporary, temporary.open("wb") as opened:
        np.savez(opened, left_out=np.frombuffer(json.dumps(made.left_out).encode(), dtype=np.uint8), **parts)
    return made


def index(file: StoredFile, names: Names) -> Index:
    """Read the list of members of a tar or zip file; which it is shows in its first bytes. See `index_all`."""
    found: dict[bytes, Member] = {}  # a later member of the same name replaces the one before, as if both were unpacked
    arrays: dict[bytes, Member] = {}
    others: dict[bytes, Member] = {}  # which hard links may lead to
    try:
        with closing(file.stream()) as opened:
            first = opened.read(6)
            if first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")):
                raise ArchiveError(compressed(file.place))
            opened.seek(0)
            listed = (
                _zip_members(file, opened)
                if first.startswith((b"PK\x03\x04", b"PK\x05\x06"))
                else _tar_members(file, opened)
            )
            for name, place in listed:
                path = name.removeprefix("./")
                folder, _, last = path.rpartition("/")
                if isinstance(place, str):
                    target = os.fsencode(place.removeprefix("./"))
                    member = next((kind[target] for kind in (found, arrays, others) if target in kind), None)
                else:
                    member = place
                kind = others
                if not _is_hidden(folder):
                    is_image = names.is_image(last, functools.partial(bool, member))
                    kind = found if is_image else arrays if names.is_array(last) else others
                if member is not None:
                    kind[os.fsencode(path)] = member
    except ARCHIVE_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise ArchiveError(f"{file.place} is damaged or cut short ({_words(error)}); copy it again") from error
    return Index(_packed(found), _packed(arrays), dict(names.left_out))


def _packed(found: dict[bytes, Member]) -> Members:
    ordered = sorted(found)
    ends = np.cumsum([len(name) for name in ordered], dtype=np.int64)
    members = np.array([found[name] for name in ordered], dtype=np.int64).reshape(-1, len(Member._fields))
    return Members(np.frombuffer(bytearray(b"".join(ordered)), dtype=np.uint8), ends, members)


def _tar_members(file: StoredFile, opened: BinaryIO) -> Iterator[tuple[str, Member | str | None]]:
    """Name and place of each member; of a hard link the name that it leads to, of what is no file None."""
    with tarfile.open(fileobj=opened, mode="r:", errorlevel=1) as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else it keeps all, a kilobyte each
            if not info.isdir():
                is_file = info.isreg() and not info.issparse()
                member = Member(info.offset_data, info.size, IN_TAR, info.size, 0) if is_file else None
                yield info.name, info.linkname if info.islnk() else member
        end = archive.offset
    # tarfile takes a header that it does not understand, and the end of the file, for the end of the archive.
    opened.seek(end)
    block = opened.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ArchiveError(
            f"{file.place} is cut short: it ends at byte {file.size:,} without the mark of its end; copy it again, or "
            "write it again if the program that made it was stopped"
        )
    if block.strip(b"\0"):
        raise ArchiveError(f"{file.place} is damaged: what is at byte {end:,} is no member; copy or write it again")


def _zip_members(file: StoredFile, opened: BinaryIO) -> Iterator[tuple[str, Member | None]]:
    try:
        archive = zipfile.ZipFile(opened)
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{file.place} is damaged or cut short: {error}; copy it again") from error
    with archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise ArchiveError(f"{file.place} is encrypted ({info.filename}); unpack it and leave the password out")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ArchiveError(
                    f"{file.place}: {info.filename} is compressed by method {info.compress_type} of zip; stored and "
                    "deflated members can be read: pack it again with zip -0"
                )
            mode = info.external_attr >> 16
            is_file = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            fields = (info.header_offset, info.compress_size, info.compress_type, info.file_size, info.CRC)
            yield info.filename, Member(*fields) if is_file else None


ZIP_HEADER = struct.Struct("<4s22xHH")
"""Of a member: its mark, and how long name and extra fields are, which its data come after."""


def read_member(file: StoredFile, member: Member) -> bytes:
    """The content of a member, checked as far as the archive allows.

    Raises: OSError or ValueError if it is damaged; UserError as `StoredFile.read`.
    """
    if member.method == IN_TAR:
        return file.read(member.start, member.stored)
    # One request for what is far away: names are short, and extra fields are few.
    guess = min(ZIP_HEADER.size + 512 + member.stored, file.size - member.start)
    data = file.read(member.start, max(guess, ZIP_HEADER.size))
    mark, *lengths = ZIP_HEADER.unpack_from(data)
    if mark != b"PK\x03\x04":
        raise ValueError("its header in the zip file is damaged")
    start = ZIP_HEADER.size + sum(lengths)
    if start + member.stored > len(data):
        data = file.read(member.start, start + member.stored)
    data = data[start : start + member.stored]
    if member.method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)  # no more, whatever it holds
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError("its checksum in the zip file is another one")
    return data
