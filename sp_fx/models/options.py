"""What a caller says of a network in place of what is published or assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .classes import read_class_names
from .images import Preprocessing, Side


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `sp_fx.models.load`, which says what each is, as one value; None leaves what is published or
    assumed as it is."""

    weights: str | Path | None = None
    input_size: int | None = None
    resize: int | None = None
    squash: bool = False
    num_classes: int | None = None
    class_names: Sequence[str] | str | Path | None = None
    multi_label: bool = False
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    pixels: tuple[float, float] | None = None
    trust_pickle: bool = False

    @property
    def normalises(self) -> bool:
        return not (self.mean is None and self.std is None and self.pixels is None)

    def preprocessing(self, published: Preprocessing) -> Preprocessing:
        """Returns the published preprocessing with what the caller says instead.

        Raises:
            ValueError: a `std` that is not above 0, `pixels` of which the second is not above the first, a mean outside of them
                or without a std, neither one number nor one a channel; a `resize` below the crop.
        """
        crop: Side = published.crop if self.input_size is None else self.input_size
        resize = self.resize or (crop if self.squash else resized_for(published, crop, self.weights is not None))
        if self.resize is not None and self.resize < (crop if isinstance(crop, int) else max(crop)):
            raise ValueError(f"a picture resized to {self.resize} does not cover the crop of {crop}: resize is at least that")
        made = replace(published, resize=resize, crop=crop, squash=published.squash or self.squash)
        if not self.normalises:
            return made
        low, high = self.pixels or (0.0, 1.0)
        if not high > low:
            raise ValueError(f"pixels are (low, high), such as (0, 255) or (-1, 1), with low below high; got {self.pixels}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"who says the mean says the std too, since they go together; got mean={self.mean}, std={self.std}")
        channels = len(published.mean)
        mean, std = _each(self.mean, 0.0, channels, "mean"), _each(self.std, 1.0, channels, "std")
        if not all(s > 0 for s in std):
            raise ValueError(f"a std is above 0 for each channel, got {list(std)}")
        if not all(low <= m <= high for m in mean):
            raise ValueError(
                f"a mean is one of pixels from {low:g} to {high:g}, got {list(mean)}; pixels=(0, 255) are of that range"
            )
        return replace(made, mean=tuple((m - low) / (high - low) for m in mean), std=tuple(s / (high - low) for s in std))

    def unsaid(self, used: Preprocessing) -> str:
        """Returns, in words, what of the preprocessing that is used the caller has not said; "" where it was all said."""
        found = []
        if self.resize is None and not self.squash:
            crop = " x ".join(map(str, used.cropped))
            if used.squash:
                how = f"pictures are squashed to {crop}"
            elif used.resize == used.crop:
                how = f"pictures just cover {crop}"
            else:
                how = f"of pictures resized to {used.resize} the centre {crop}"
            found.append(f"{how} (--input-size, --resize, --squash say otherwise)")
        if not self.normalises:
            found.append(f"mean {used.mean} with deviation {used.std} of pixels in [0, 1] (--mean, --std, --pixels)")
        return "; ".join(found)

    def names(self) -> tuple[str, ...] | None:
        """Returns the caller's names of the classes."""
        names = self.class_names
        return read_class_names(names) if isinstance(names, str | Path) else None if names is None else tuple(names)


def _each(values: float | Sequence[float] | None, default: float, channels: int, what: str) -> tuple[float, ...]:
    if values is None:
        return (default,) * channels
    each = (float(values),) * channels if isinstance(values, int | float) else tuple(map(float, values))
    each = each * channels if len(each) == 1 else each
    if len(each) != channels:
        raise ValueError(f"expected one {what} for all channels or one for each of {channels}, got {len(each)}")
    return each


def resized_for(published: Preprocessing, crop: Side, own: bool) -> Side:
    """Returns what a picture is resized to for that crop. A crop between the published one and what it is cut from only takes
    more of it: 227 of 256, where 224 is published. For another, the published proportion; for weights of the caller's `own` the
    crop itself, since networks that were fine-tuned at 64 pixels rarely saw the centre of 73."""
    resize, old, new = published.resize, published.crop, crop
    if crop == old or not (isinstance(resize, int) and isinstance(old, int) and isinstance(new, int)):
        return resize if crop == old else crop
    if old <= new <= resize and not published.squash:
        return resize
    return new if own else round(new * resize / old)
