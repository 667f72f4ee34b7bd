"""What a model takes, and the seeded values it is given."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Input"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a model.

    Attributes:
        shape: with the batch first, but for a list of single images.
        name: the keyword it is given by; ``None``: by its position.
        below: whole numbers (int64) from 0 to one less than this, such as token ids; ``None``: numbers in
            [0, 1) of the model's floating point type.
        is_list: whether the model takes a list of single images (torchvision's detection models).
    """

    shape: tuple[int, ...]
    name: str | None = None
    below: int | None = None
    is_list: bool = False
