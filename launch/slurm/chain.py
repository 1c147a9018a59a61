"""The arrays of a sweep: one per stage and needed run, chunked, chained and throttled."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from bip.errors import UserError
from launch.plan import STAGES
from launch.sweep import Run


@dataclass
class Array:
    """One sbatch --array: `tasks[i]` are the RUN_IDs that its task i runs, one after the other.

    Its tasks wait for the success of `corr` (task i for task i of that array) and of `after` (tasks
    in the queue, or the tasks of runs of this submission), and for the end of `throttled_by`.
    """

    stage: str
    tasks: list[list[str]]
    parallelism: int = 1
    corr: "Array | None" = None
    after: list["tuple[Array, str] | str"] = field(default_factory=list)
    throttled_by: "Array | None" = None
    job: str = ""

    def task_of(self, run_id: str) -> str:
        """The name of the task that executes a run, after submission."""
        (index,) = [index for index, task in enumerate(self.tasks) if run_id in task]
        return f"{self.job}_{index}"

    @property
    def dependency(self) -> str:
        """sbatch's --dependency; the arrays in it must be submitted already."""
        names = [one if isinstance(one, str) else one[0].task_of(one[1]) for one in self.after]
        parts = [f"aftercorr:{self.corr.job}"] if self.corr else []
        parts += [f"afterok:{':'.join(names)}"] if names else []
        parts += [f"afterany:{self.throttled_by.job}"] if self.throttled_by else []
        return ",".join(parts)


def plan_arrays(
    runs: Sequence[Run],
    run_ids: Collection[str],
    done: Collection[str],
    queued: dict[str, str],
    parallelism: int,
    runs_per_task: int = 1,
    max_array_size: int = 1001,
) -> list[Array]:
    """The arrays for `run_ids`, in an order in which they can be submitted.

    `queued` (RUN_ID -> array task) are in the queue already. At most `parallelism` of the new tasks
    of a stage run at once. Queued tasks do not count: an array's throttle cannot change, and they
    may end soon.
    Raises UserError for a run that needs one that is neither done, queued nor in `run_ids`.
    """
    wanted = [r for r in runs if r.run_id in run_ids and r.run_id not in {*done, *queued}]
    needs = {r.run_id: [need for need in r.needs if need not in done] for r in wanted}
    followers: dict[str, list[str]] = {}
    for run_id, needed in needs.items():
        for need in needed:
            followers.setdefault(need, []).append(run_id)
    # needed run -> the one run that waits for it, and for no other
    partner = {need: f[0] for need, f in followers.items() if len(f) == len(needs[f[0]]) == 1}

    def followed(run_id: str) -> int:
        """The length of the chain of runs that wait for this one."""
        return 1 + followed(partner[run_id]) if run_id in partner else 0

    def chunks(run_ids: list[str]) -> list[Array]:
        # The longest chains first, so that later arrays have no gaps in their task numbers.
        ordered = sorted(run_ids, key=followed, reverse=True)
        per_task, size = runs_per_task, max_array_size
        tasks = [ordered[at : at + per_task] for at in range(0, len(ordered), per_task)]
        return [Array(stage, tasks[at : at + size]) for at in range(0, len(tasks), size)]

    place: dict[str, Array] = {}  # RUN_ID -> its array in this submission
    for stage in STAGES:
        free, corresponding, other = [], set(), []
        for run in [run for run in wanted if run.stage == stage]:
            run_id, needed = run.run_id, needs[run.run_id]
            if missing := [n for n in needed if n not in place and n not in queued]:
                raise UserError(
                    f"{run_id} needs {missing[0]}, which is neither done nor submitted; "
                    "python -m launch resume FOLDER submits both"
                )
            if not needed:
                free.append(run_id)
            elif needed[0] in place and partner.get(needed[0]) == run_id:
                corresponding.add(run_id)
            else:
                other.append(run_id)
        groups = chunks(free)
        for before in unique(place.values()):
            follow = [
                [partner[n] for n in task if partner.get(n) in corresponding]
                for task in before.tasks
            ]
            tasks = list(takewhile(bool, follow))  # task i waits for task i
            if tasks:
                groups.append(Array(stage, tasks, corr=before))
            other += [run_id for task in follow[len(tasks) :] for run_id in task]
        # An array per needed run, so that a run fails only with the run that it needs.
        alike: dict[tuple[str, ...], list[str]] = {}
        for run_id in other:
            alike.setdefault(tuple(needs[run_id]), []).append(run_id)
        for needed_by_all, run_ids_alike in alike.items():
            for array in chunks(run_ids_alike):
                array.after += [(place[n], n) for n in needed_by_all if n in place]
                array.after += sorted({queued[n] for n in needed_by_all if n not in place})
                groups.append(array)
        _share(groups, parallelism)
        place |= {run_id: array for array in groups for task in array.tasks for run_id in task}
    return unique(place.values())


def unique(arrays: Iterable[Array]) -> list[Array]:
    return list({id(array): array for array in arrays}.values())


def _share(arrays: list[Array], parallelism: int) -> None:
    """Set throttles that add up to `parallelism`; further arrays wait for an earlier one to end."""
    together = arrays[:parallelism]
    for number, array in enumerate(together):
        array.parallelism = parallelism // len(together) + (number < parallelism % len(together))
    for number, array in enumerate(arrays[parallelism:]):
        array.parallelism = 1
        array.throttled_by = arrays[number]
