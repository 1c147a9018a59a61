"""Which arrays a sweep becomes: one per stage and need, chunked, chained and throttled.

Runs of one stage may follow one another (the rounds of a method): each round is an array.
"""

import itertools
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
    stage_of = {run.run_id: run.stage for run in wanted}
    # (need, stage) -> the one run of the stage that waits for it and for nothing else
    partner: dict[tuple[str, str], str] = {}
    for need, waiting in followers.items():
        for stage in STAGES:
            own = [run_id for run_id in waiting if stage_of[run_id] == stage]
            if len(own) == 1 == len(needs[own[0]]):
                partner[need, stage] = own[0]

    def rounds(run_id: str) -> list[str]:
        """The runs of its own stage that follow it, one after the other."""
        found = [run_id]
        while after := partner.get((found[-1], stage_of[run_id])):
            found.append(after)
        return found[1:]

    def followed(run_id: str) -> tuple[int, int]:
        """How many rounds follow this run, and how many runs of later stages, one by one."""
        length, name = 0, run_id
        for stage in STAGES[STAGES.index(stage_of[run_id]) + 1 :]:
            if after := partner.get((name, stage)):
                length, name = length + 1, after
        return len(rounds(run_id)), length

    def chunks(stage: str, run_ids: list[str]) -> list[Array]:
        # The longest chains first: the arrays that follow then have no gaps among their tasks.
        ordered = sorted(run_ids, key=followed, reverse=True)
        per_task, size = runs_per_task, max_array_size
        tasks = [ordered[at : at + per_task] for at in range(0, len(ordered), per_task)]
        return [Array(stage, tasks[at : at + size]) for at in range(0, len(tasks), size)]

    found: list[Array] = []
    place: dict[str, Array] = {}  # RUN_ID -> its array in this submission

    def group(stage: str, runs_of_stage: list[str]) -> list[Array]:
        """The arrays of runs of one stage that do not wait for one another."""
        free, corresponding, other = [], set(), []
        for run_id in runs_of_stage:
            needed = needs[run_id]
            if missing := [n for n in needed if n not in place and n not in queued]:
                raise UserError(
                    f"{run_id} needs {missing[0]}, which is neither done nor submitted; "
                    "python -m launch resume FOLDER submits both"
                )
            if not needed:
                free.append(run_id)
            elif needed[0] in place and partner.get((needed[0], stage)) == run_id:
                corresponding.add(run_id)
            else:
                other.append(run_id)
        arrays = chunks(stage, [name for name in free if rounds(name)])
        arrays += chunks(stage, [name for name in free if not rounds(name)])
        for before in unique(place.values()):
            follow = [
                [partner[n, stage] for n in task if partner.get((n, stage)) in corresponding]
                for task in before.tasks
            ]
            tasks = list(takewhile(bool, follow))  # task i waits for task i
            if tasks:
                arrays.append(Array(stage, tasks, corr=before))
            other += [run_id for task in follow[len(tasks) :] for run_id in task]
        # An array for each need: what waits for one task must not fail with the task beside it.
        alike: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        for run_id in other:
            alike.setdefault((not rounds(run_id), tuple(needs[run_id])), []).append(run_id)
        for (_, needed_by_all), run_ids_alike in alike.items():
            for array in chunks(stage, run_ids_alike):
                array.after += [(place[n], n) for n in needed_by_all if n in place]
                array.after += sorted({queued[n] for n in needed_by_all if n not in place})
                arrays.append(array)
        return arrays

    for stage in STAGES:
        left = [run.run_id for run in wanted if run.stage == stage]
        lanes: dict[int, list[Array]] = {}  # id of a lane's first array -> the arrays in turn
        lane_of: dict[str, int] = {}
        while left:
            waiting = [name for name in left if not {*left}.isdisjoint(needs[name])]
            arrays = group(stage, [name for name in left if name not in waiting])
            for array in arrays:
                names = [name for task in array.tasks for name in task]
                before = [lane_of[need] for need in needs[names[0]] if need in lane_of]
                lane = before[0] if before else id(array)
                lanes.setdefault(lane, []).append(array)
                lane_of |= dict.fromkeys(names, lane)
                place |= dict.fromkeys(names, array)
            left = waiting
        _share(list(lanes.values()), parallelism)
        found += [array for lane in lanes.values() for array in lane]
    return found


def unique(arrays: Iterable[Array]) -> list[Array]:
    return list({id(array): array for array in arrays}.values())


def _share(lanes: list[list[Array]], parallelism: int) -> None:
    """Throttles that add up to `parallelism`; lanes beyond it wait for one before them.

    A lane is an array and those of its stage that follow it. Where not all tasks of one run at
    once, the next waits for all of them.
    """
    together = min(len(lanes), parallelism)
    for number, lane in enumerate(lanes):
        share = parallelism // together + (number < parallelism % together)
        if number >= together:
            share = 1
            lane[0].throttled_by = lanes[number - together][-1]
        for array in lane:
            array.parallelism = share
        for before, array in itertools.pairwise(lane):
            if len(before.tasks) > share:
                array.throttled_by = before
