"""Models on disk, one tensor at a time: safetensors, and Megatron's distributed checkpoints."""

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in safetensors


@dataclass(frozen=True)
class Place:
    """Where a checkpoint has a tensor: under its key, which stacks those of all layers."""

    key: str
    shape: tuple[int, ...]
    layer: int | None = None  # None: not stacked
    layers: int = 0

    @property
    def chunk(self) -> ChunkStorageMetadata:
        offsets, sizes = (0,) * len(self.shape), self.shape
        if self.layer is not None:
            offsets, sizes = (self.layer, *offsets), (1, *sizes)
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    @property
    def whole(self) -> torch.Size:
        """Shape of all that is under the key."""
        return torch.Size(self.shape if self.layer is None else (self.layers, *self.shape))


class SafeTensors:
    """A folder's model.safetensors, or else those that its index names."""

    def __init__(self, folder: Path) -> None:
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():
            files = [single.name]
        elif index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            others = [p.name for p in sorted(folder.glob("*.bin"))]
            there = f"only {others[0]}; load it and save_pretrained it" if others else "none"
            raise ValueError(f"{folder}: a model is read from model.safetensors, there is {there}")
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}  # "F32", …
        for file in files:
            with safe_open(folder / file, "pt") as opened:
                for name in opened.keys():
                    entry = opened.get_slice(name)
                    self._files[name] = folder / file
                    self.shapes[name] = tuple(entry.get_shape())
                    self.types[name] = entry.get_dtype()

    def read(self, name: str) -> Tensor:
        # open for one tensor: the map of a file keeps in memory all that was read of it
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], numbers: Iterable[Tensor]) -> None:
    """One file of these tensors, which may be on the meta device; `numbers` yields their contents
    in the same order.

    The format: the length of the header in 8 bytes, the header in JSON, the tensors.
    """
    types = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        offsets = [end, end := end + x.nbytes]
        header[name] = {"dtype": types[x.dtype], "shape": [*x.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in numbers:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_checkpoint(folder: Path, tensors: Iterable[tuple[Place, Tensor]]) -> None:
    """A checkpoint as if one rank had saved the model. (torch's own writer keeps in memory the last
    tensor of every key, Megatron's all of them.)"""
    metadata: dict[str, Any] = {}
    storage = {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for place, tensor in tensors:
            empty = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), place.whole, [])
            metadata.setdefault(place.key, empty).chunks.append(place.chunk)
            begin = file.tell()
            torch.save(tensor.view(place.chunk.sizes), file)
            info = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
            storage[MetadataIndex(place.key, place.chunk.offsets)] = info
        file.flush()
        os.fsync(file.fileno())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(metadata, storage_data=storage)))
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))


class Checkpoint:
    """The tensors of one role's checkpoint, whatever layout saved it.

    average: instead of the weights, their moving average, rounded to the weights' type. Raises
    ValueError when the checkpoint has none."""

    def __init__(self, folder: Path, average: bool = False) -> None:
        self._reader = dcp.FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._tensors: dict[str, Any] = metadata.state_dict_metadata
        self._prefix = "optimizer.ema." if average else ""
        if average and not any(key.startswith(self._prefix) for key in self._tensors):
            raise ValueError(f"{folder} has no moving average of the weights (ema_decay)")

    def dtype(self, place: Place) -> torch.dtype:
        return self._tensors[place.key].properties.dtype

    def empty(self, place: Place) -> Tensor:
        """A tensor of this shape and dtype on the meta device."""
        return torch.empty(place.shape, dtype=self.dtype(place), device="meta")

    def read(self, place: Place) -> Tensor:
        """What is there; of a padded vocabulary the first rows."""
        key = self._prefix + place.key
        saved = self._tensors[key]
        tensor = torch.empty(place.chunk.sizes, dtype=saved.properties.dtype)
        pieces = create_read_items_for_chunk_list(key, saved, [place.chunk])
        self._reader.read_data(LoadPlan(pieces), _Into(tensor)).wait()
        return tensor.view(place.shape).to(self.dtype(place))


class _Into(dcp.DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        at = zip(read_item.dest_offsets, read_item.lengths)
        return self.tensor[tuple(slice(i, i + n) for i, n in at)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
