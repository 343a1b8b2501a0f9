"""Whether a checkpoint file is whole, as far as the file itself tells."""

import json
import os
import struct

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".zip", ".npz", ".distcp", ".safetensors")
"""Names of files that are worth opening: a scan of 100,000 others stays a scan of names."""
END = struct.Struct("<4s4H2LH")
"""Zip's end of central directory, which torch.save writes last."""
SIGNATURE, FIRST = b"PK\x05\x06", b"PK\x03\x04"
LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors format's own bound."""
READ_HEADER = 1 << 22
"""Bytes of a safetensors header that are read; a longer one counts as whole."""


def is_torn(name: str, fd: int, size: int) -> bool:
    """Whether the writer of a file was killed half-way. False also where the format does not tell (a pickle of before
    torch 1.6, text). Raises OSError."""
    if not name.endswith(SUFFIXES):
        return False
    if size == 0:
        # DCP writes an empty file for a rank that has nothing to save.
        return not name.endswith(".distcp")
    if name.endswith(".safetensors"):
        return _torn_safetensors(fd, size)
    return os.pread(fd, 4, 0) == FIRST[: min(size, 4)] and _torn_zip(fd, size)


def _torn_zip(fd: int, size: int) -> bool:
    if size < END.size:
        return True
    # torch writes no comment behind the record, so it ends the file; another tool's comment is looked past.
    tail = os.pread(fd, 4096, max(0, size - 4096))
    at = tail.rfind(SIGNATURE)
    if at < 0 or len(tail) - at < END.size:
        return True
    _, _, _, _, entries, length, _, comment = END.unpack_from(tail, at)
    if len(tail) - at != END.size + comment:
        return True
    # 2**32-1 and 65535 say that the zip64 record has the numbers, which comes before this one.
    return bool(length != 0xFFFFFFFF and entries != 0xFFFF and length + END.size > size)


def _torn_safetensors(fd: int, size: int) -> bool:
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        return True
    length = int.from_bytes(start, "little")
    if length > LARGEST_HEADER or 8 + length > size:
        return True
    if length > READ_HEADER:
        return False
    try:
        header = json.loads(os.pread(fd, length, 8))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return True
    return 8 + length + max(ends, default=0) != size
