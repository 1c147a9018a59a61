"""A profile: the facts of the machine or cluster that a sweep runs on."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bip.config import read_yaml
from bip.errors import UserError
from bip.flags import one_line

LOCAL = Path(__file__).parent.parent / "slurm" / "profiles" / "local.yml"


class Profile(BaseModel):
    """What `slurm/profiles/*.yml` holds. Names are SLURM's where SLURM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    executor: Literal["local"] = Field(description="what starts the jobs")
    parallelism: int = Field(2, ge=1, description="runs at once")
    ntasks_per_node: int = Field(1, ge=1, description="processes (ranks) of one run")
    cpus_per_task: int = Field(1, ge=1, description="threads of one rank (OMP_NUM_THREADS)")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the runs")


def load_profile(path: Path | None, parallelism: int | None = None) -> Profile:
    """The profile in `path` (None: the local one); `parallelism` beats the file's.

    Raises UserError naming the file and the key.
    """
    path = path or LOCAL
    if not path.is_file():
        raise UserError(f"profile: no such file: {path}")
    values = read_yaml(path)
    try:
        profile = Profile(**values)
        if parallelism is not None:
            if parallelism < 1:
                raise UserError(f"parallelism: must be at least 1, not {parallelism}")
            profile = profile.model_copy(update={"parallelism": parallelism})
    except ValidationError as error:
        raise one_line(error, Profile.model_fields, str(path)) from None
    return profile
