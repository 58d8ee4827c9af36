"""Keep the keys and values of sampled texts with room for tokens to come.

transformers' own cache copies everything that it holds for each new token.
"""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens; a cache is copied once for so many of them


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer: views of larger tensors, whose other columns wait for tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._room_for_keys: Tensor | None = None
        self._room_for_values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (B, H, T, D); return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        self._room_for_keys = _append(self._room_for_keys, key_states, length)
        self._room_for_values = _append(self._room_for_values, value_states, length)
        self.keys = self._room_for_keys[..., :total, :]
        self.values = self._room_for_values[..., :total, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``, without the room."""
        super().batch_select_indices(indices)
        self._room_for_keys, self._room_for_values = self.keys, self.values


def _append(room: Tensor | None, new: Tensor, length: int) -> Tensor:
    """Write ``new`` (B, H, T, D) behind the first ``length`` tokens; return the tensor that holds them."""
    total = length + new.shape[-2]
    if room is None or total > room.shape[-2]:
        larger = new.new_empty(*new.shape[:-2], total + ROOM, new.shape[-1])
        if room is not None:
            larger[..., :length, :] = room[..., :length, :]
        room = larger
    room[..., length:total, :] = new
    return room


def new_cache() -> Cache:
    """Return an empty cache."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def holds_all_rows(cache: Cache, num_rows: int, num_tokens: int) -> bool:
    """Return whether the cache holds keys and values of so many rows and tokens, and nothing else.

    A model that keeps a state elsewhere, or in another form, cannot lose rows.
    """
    sizes = set()
    for layer in cache.layers:
        if type(layer) is not GrowingLayer:
            return False
        if layer.keys is not None:  # a layer that reads another's keys has none
            sizes.add((layer.keys.shape[0], layer.keys.shape[-2]))
    return sizes == {(num_rows, num_tokens)}


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep only the rows with indices ``rows``."""
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        if layer.keys is not None:
            layer.batch_select_indices(rows)
