"""What every method is: a frozen config that can check a model, attach itself to a run, and say when it does nothing."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from diffaccel.engine.run import Layer, Run
from diffaccel.engine.seams import Seams
from diffaccel.models.model_map import ModelMap


class Method(BaseModel):
    """Base of all methods. Settings are validated, never clamped; unknown settings are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: ClassVar[str]
    layer: ClassVar[Layer]
    inside: ClassVar[bool] = True  # whether it acts inside networks, or only needs their calls
    by_token: ClassVar[bool] = False  # whether it needs all tokens of a picture in one place

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take true for 1, which is the off value of some settings
        values = value if isinstance(value, (list, tuple)) else (value,)
        if (
            any(isinstance(item, bool) for item in values)
            and cls.model_fields[str(info.field_name)].annotation is not bool
        ):
            raise ValueError("true and false are no values of this setting")
        return value

    @property
    @abstractmethod
    def is_off(self) -> bool:
        """True if these settings make the method bit-identical to no method."""

    def check(self, model: ModelMap) -> None:
        """Raise `Unsupported` with the reason if this method cannot work on this model."""

    def located(self, folder: Path) -> Method:
        """This method as read from a recipe file in `folder`: where it names files, they are found from there.

        Raises:
            RecipeError: a file that a recipe file may not name.
        """
        return self

    def portable(self, folder: Path) -> Method:
        """The inverse of `located`: this method as it is written to a recipe file in `folder`.

        Raises:
            RecipeError: it names a file that a recipe file there may not name.
        """
        return self

    def prepare_call(self, pipe: Any, arguments: dict[str, Any], run: Run, seams: Seams) -> dict[str, Any]:
        """Change the pipeline's call arguments (only schedule methods do)."""
        return arguments

    @abstractmethod
    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        """Install the method for one run of the scheduler; a call with several of them attaches it as often.

        Everything changed must go through `seams`. State starts here; what has to outlive a run is in `run.kept`.
        """


REGISTERED: dict[str, type[Method]] = {}  # by name, as far as their files were imported


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known to recipes under its `name`."""
    REGISTERED[cls.name] = cls
    return cls
