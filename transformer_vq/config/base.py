"""What every settings class shares: frozen, strictly typed, unknown keys refused. No torch in this folder."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of settings. Immutable; a wrong key, type or bound raises before anything is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def written(self) -> Self:
        """These settings as a run folder keeps them."""
        return self


class ConfigError(ValueError):
    """The user's input is wrong. One line: key, value, what is allowed. The command line exits with 2."""
