"""Decoding parameters of image files, which travel from training into every bundle."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from typing_extensions import Self

from advmoe_deploy.specs import Frozen, ModelSpec

# Pillow's decoders that run no other program (unlike EPS) and tell their files by their first bytes
# (unlike TGA), with the suffixes that folders are searched for.
IMAGE_FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes))
_UNSCALED_SIZE = 64


class Decoding(Frozen):
    """Parameters of the decoder that training, export, verify and predict share.

    An image is turned as its EXIF orientation says. Its central square, of ``size`` /
    ``shorter_side`` of its shorter side, is scaled to ``size`` x ``size``; an image of exactly that
    size is taken as it is. One channel is luminance, three are RGB. Images above ``max_pixels`` are
    refused. Fields of one choice only are for readers without this package; ``rule`` grows when
    the same parameters come to give other pixels.
    """

    rule: Literal[1] = 1
    size: int = Field(ge=1)
    channels: int = Field(ge=1)
    shorter_side: int
    crop: Literal["centre"] = "centre"
    interpolation: Literal["bilinear, antialiased"] = "bilinear, antialiased"
    orientation: Literal["exif"] = "exif"
    frame: Literal["first"] = "first"
    sixteen_bit: Literal["scaled"] = "scaled"
    transparency: Literal["dropped"] = "dropped"
    palette: Literal["expanded"] = "expanded"
    cmyk: Literal["inks multiplied"] = "inks multiplied"
    colour_profile: Literal["ignored"] = "ignored"
    luminance: Literal["ITU-R 601"] = "ITU-R 601"
    formats: tuple[str, ...] = Field(tuple(IMAGE_FORMATS), min_length=1)
    max_pixels: int = Field(64_000_000, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shorter_side < self.size:
            raise ValueError(f"shorter_side={self.shorter_side} is below size={self.size}")
        if unknown := set(self.formats) - set(IMAGE_FORMATS):
            raise ValueError(f"formats {sorted(unknown)} are none of {', '.join(IMAGE_FORMATS)}")
        return self

    @classmethod
    def of(cls, size: int, channels: int = 3) -> "Decoding":
        """Return the default: 7/8 of the shorter side is kept (224 of 256), all up to 64 pixels."""
        shorter_side = size * 8 // 7 if size > _UNSCALED_SIZE else size
        return cls(size=size, channels=channels, shorter_side=shorter_side)

    def description(self) -> str:
        """Return the decoder in words, for those who write one without this package."""
        square, colour = f"{self.size} x {self.size}", {1: "luminance (ITU-R 601)", 3: "RGB"}
        return (
            "The first frame of a file is turned upright by its EXIF orientation and read as "
            f"{colour.get(self.channels, 'channels')} of 8 bits. 16-bit grey is divided by 257 and "
            "rounded, 16-bit colour keeps its high bytes; palettes are expanded, transparency is "
            "dropped (not blended with a colour), CMYK is multiplied out as Pillow does it, colour "
            f"profiles are ignored. The central square, {self.size}/{self.shorter_side} of the "
            f"shorter side, is scaled to {square}, bilinearly with antialiasing (Pillow's "
            "BILINEAR); an image of that size is taken as it is. Values are divided by 255."
        )


def _or_default(decoding: Any, info: ValidationInfo) -> Any:
    spec = info.data.get("model")
    if decoding is not None or not isinstance(spec, ModelSpec):
        return decoding
    return Decoding.of(spec.image_size, spec.in_channels)


def _fits_model(decoding: Decoding, info: ValidationInfo) -> Decoding:
    spec = info.data.get("model")
    shape = (decoding.channels, decoding.size, decoding.size)
    if isinstance(spec, ModelSpec) and shape != spec.image_shape:
        raise ValueError(f"gives images {shape}, the model takes {spec.image_shape}")
    return decoding


# A field after ``model: ModelSpec``, whose images it reads; ``None`` becomes the model's default.
ModelDecoding = Annotated[Decoding, BeforeValidator(_or_default), AfterValidator(_fits_model)]
