"""Reading a base's tensors from its safetensors files on demand, with pread into existing buffers.

safetensors' own `safe_open(...).get_slice` is not used, because it maps the file into memory. When a file of 300 MB is
read twice through a buffer of 15 MB, resident memory grows by 3 MB with pread, by 303 MB with one `safe_open`, and by
18 MB with a new `safe_open` for each tensor (measured). Also, a mapped file that has been truncated in the meantime
ends the process with SIGBUS, whereas pread reports it.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from softprompt.utils.errors import ModelError, TrainingError, first_line

FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 1 << 22  # for the conversion of dtypes


class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        shape: Its shape.
        file_dtype: The dtype in the file.
        dtype: The dtype in which its values are returned, as if it had been loaded into a model of that dtype. Set it
            to convert; it is `file_dtype` at first.
    """

    def __init__(self, file: BinaryIO, offset: int, file_dtype: torch.dtype, shape: tuple[int, ...]):
        self.file, self.offset, self.file_dtype, self.shape = file, offset, file_dtype, shape
        self.dtype = file_dtype

    @property
    def nbytes(self) -> int:
        """The size of the values in `dtype`, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, target: Tensor, first: int = 0) -> None:
        """Fill `target` with consecutive values of the flattened tensor, starting at index `first`.

        Args:
            target: A contiguous tensor on the CPU, of any shape and dtype; values are converted to its dtype.
            first: Index of the first value.

        Raises:
            TrainingError: The file has become shorter, or cannot be read.
        """
        self._fill(target.view(-1), first)

    def bytes(self, start: int, stop: int) -> Tensor:
        """Return bytes [start, stop) of the values in `dtype`, as a uint8 tensor [stop - start] on the CPU.

        Raises:
            TrainingError: The file has become shorter, or cannot be read.
        """
        size = self.dtype.itemsize
        first, last = start // size, -(-stop // size)
        values = torch.empty(last - first, dtype=self.dtype)
        self._fill(values, first)
        return values.view(torch.uint8)[start - first * size : stop - first * size]

    def _fill(self, target: Tensor, first: int) -> None:
        """Fill target [n] with values [first, first + n)."""
        size = self.file_dtype.itemsize
        if self.file_dtype == self.dtype == target.dtype:
            return self._pread(target, self.offset + first * size)
        staging = torch.empty(min(len(target), CHUNK_BYTES // size), dtype=self.file_dtype)
        for start in range(0, len(target), max(1, len(staging))):
            part = target[start : start + len(staging)]
            self._pread(staging[: len(part)], self.offset + (first + start) * size)
            part.copy_(staging[: len(part)].to(self.dtype))

    def _pread(self, target: Tensor, offset: int) -> None:
        view = memoryview(target.view(torch.uint8).numpy())
        while len(view):
            try:
                count = os.preadv(self.file.fileno(), [view], offset)
            except OSError as error:
                raise TrainingError(f"{self.file.name} cannot be read: {error.strerror}") from None
            if not count:
                raise TrainingError(f"{self.file.name} has become shorter since it was opened; do not write to it")
            view, offset = view[count:], offset + count


class ConcatenatedTensor(StoredTensor):
    """A tensor whose flattened values are those of other stored tensors, one after the other.

    For example, the stacked matrices of experts [experts, out, in] may be stored as one tensor [out, in] per expert.
    """

    def __init__(self, parts: Sequence[StoredTensor], shape: tuple[int, ...]):
        """
        Args:
            parts: They share one `dtype`, and hold as many values as `shape` together.
        """
        first = parts[0]
        super().__init__(first.file, first.offset, first.file_dtype, shape)
        self.parts, self.dtype = parts, first.dtype

    def _fill(self, target: Tensor, first: int) -> None:
        for part in self.parts:
            size = math.prod(part.shape)
            count = min(size - first, len(target))
            if count > 0:
                part._fill(target[:count], first)
                target = target[count:]
            first = max(0, first - size)


def list_stored_tensors(folder: Path, flag: str = "--stream_base") -> dict[str, StoredTensor]:
    """List all tensors of a model folder without reading their values.

    Args:
        folder: A folder with model.safetensors, or with model.safetensors.index.json and the files that it names.
        flag: What needs them, such as a flag, for the error message.

    Returns:
        The tensors by name. Their files stay open as long as a tensor exists.

    Raises:
        ModelError: There are no such files, one that the index names is missing, one is truncated or broken, or a
            tensor has a dtype other than those in DTYPES.
    """
    if (folder / FILE).is_file():
        return _tensors_of(folder / FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        advice = "load it once with transformers and save it with save_pretrained" if others else "take another base"
        only = f", only {others[0]}" if others else ""
        raise ModelError(f"{folder}: holds neither {FILE} nor {INDEX_FILE}{only}; {advice}; {flag} reads safetensors")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(_weight_map(index).values())):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing, though {INDEX_FILE} names it; fetch the base's files again")
        tensors |= _tensors_of(folder / name)
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names.values()):
            raise ValueError("weight_map does not name files of this folder")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of safetensors files ({_reason(error)}); fetch it again") from None


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Read a file's header. safetensors' format: the header's length in 8 bytes, the header in JSON, the tensors."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the tensors read from it)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({_reason(error)}); fetch it again") from None
    try:
        return _read_header(path, file)
    except ModelError:
        file.close()
        raise


def _read_header(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({_reason(error)}); fetch it again") from None
    found = {}
    for name, entry in header.items():
        try:
            found[name] = _stored(file, entry, 8 + length, size)
        except (ValueError, KeyError, TypeError) as error:
            advice = "use a base in one of these dtypes" if _has_other_dtype(entry) else "fetch the file again"
            raise ModelError(f"{path}: tensor {name[:100]}: {_reason(error)}; {advice}") from None
    return found


def _stored(file: BinaryIO, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not one of {', '.join(DTYPES)}")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes that are not integers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin:,} bytes for the shape {shape} in {entry['dtype']}")
    if data + end > size:
        raise ValueError(f"ends at byte {data + end:,} of a file of {size:,}")
    return StoredTensor(file, data + begin, dtype, tuple(shape))


def _has_other_dtype(entry: Any) -> bool:
    """Return whether a tensor's entry in the header names a dtype that safetensors may contain, but this package does
    not read."""
    return isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] not in DTYPES


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return getattr(error, "strerror", None) or first_line(error)
