"""Integer arrays from npy and npz files, nothing else: no objects, no evaluated headers.

numpy's own reader evaluates a header as a Python literal and allocates what it declares. Here a
header is matched letter by letter, and an array is a view of bytes that were read.
"""

import io
import math
import re
import zipfile
import zlib

import numpy as np

from moe_rl.traces.limits import check_size

NPY_MAGIC = b"\x93NUMPY"
# Version 1 counts the header in 2 bytes, versions 2 and 3 in 4 (numpy.lib.format).
_COUNT_BYTES = {1: 2, 2: 4, 3: 4}
_HEADER = re.compile(
    r"\{\s*'descr'\s*:\s*(?P<type>'[^']*'|\[.*\])\s*,"
    r"\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape'\s*:\s*\((?P<shape>(?:\s*[0-9]+\s*,)*\s*[0-9]*\s*)\)\s*,?\s*\}\s*"
)
_INTEGER = re.compile(r"'([<>|=]?[iu][1248])'")
_LONGEST_HEADER = 10_000  # numpy's own limit
_MOST_AXES = 32
_MOST_DIGITS = 18  # of a size
_SHOWN = 8
# OverflowError: offsets of 64 bits, which no file has.
_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OverflowError)


def npy_array(raw: bytes) -> np.ndarray:
    """The integer array of an npy file's bytes, as a view of them.

    Raises:
        ValueError: not an npy file, cut off, or of anything but integers.
    """
    kind, shape, fortran, start = _header(raw)
    needed = math.prod(shape) * kind.itemsize
    if needed > len(raw) - start:
        raise ValueError(
            f"an array of {list(shape)} {kind} takes {needed} bytes, {len(raw) - start} are there."
        )
    flat = np.frombuffer(raw, dtype=kind, count=math.prod(shape), offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


def npz_arrays(raw: bytes, wanted: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The wanted arrays that an npz file's bytes hold, and the names of some that they hold.

    Raises:
        ValueError: not a zip file of plain members, a damaged one, or one that unpacks to far more
            than the file has.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            arrays = {
                name: npy_array(_member(archive, members[f"{name}.npy"], len(raw)))
                for name in wanted
                if f"{name}.npy" in members
            }
    except _DAMAGES as error:
        raise ValueError(f"not a whole npz file ({error}).") from error
    return arrays, sorted(name.removesuffix(".npy") for name in members)[:_SHOWN]


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> bytes:
    """The bytes of one member, no more than it declares."""
    if member.flag_bits & 1:
        raise ValueError(f"{member.filename!r:.40} is encrypted.")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename!r:.40} is packed in another way than numpy's.")
    check_size(member.file_size, size, f"{member.filename!r:.40}")
    with archive.open(member) as opened:
        return opened.read(member.file_size)  # without a number it would unpack all there is


def _header(raw: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Type, shape, whether columns come first, and where the data begin."""
    if not raw.startswith(NPY_MAGIC) or len(raw) < len(NPY_MAGIC) + 2:
        raise ValueError("not a numpy file.")
    counted = _COUNT_BYTES.get(raw[len(NPY_MAGIC)])
    if counted is None:
        raise ValueError(f"version {raw[len(NPY_MAGIC)]} of the npy format, known are 1 to 3.")
    begin = len(NPY_MAGIC) + 2 + counted
    length = int.from_bytes(raw[begin - counted : begin], "little")
    if length > _LONGEST_HEADER or len(raw) < begin + length:
        raise ValueError(f"its header of {length} bytes is too long or cut off.")
    header = _HEADER.fullmatch(raw[begin : begin + length].decode("latin-1"))
    if header is None:
        raise ValueError("its header is not numpy's.")
    kind = _INTEGER.fullmatch(header["type"])
    if kind is None:
        raise ValueError(f"values of the type {header['type']:.40}, not integer ids.")
    sizes = header["shape"].replace(",", " ").split()
    if len(sizes) > _MOST_AXES or any(len(size) > _MOST_DIGITS for size in sizes):
        raise ValueError("its shape is beyond any array's.")
    shape = tuple(int(size) for size in sizes)
    return np.dtype(kind[1]), shape, header["fortran"] == "True", begin + length
