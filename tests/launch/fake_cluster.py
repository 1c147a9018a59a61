"""A cluster without SLURM: its commands are scripts that give prepared answers."""

from pathlib import Path

# sacctmgr answers with a file's lines: user, assoc and qos, with empty fields after those that they
# give. assoc's lines begin with the account.
SACCTMGR = """
[[ -e $3 ]] || { echo "You are not running a supported accounting_storage plugin" >&2; exit 1; }
account=$(grep -oE 'account=\\S*' <<<"$*" | cut -d= -f2)
commas=$(grep -oE 'format=\\S*' <<<"$*" | tr -dc , | wc -c)
case $3 in
  assoc) grep "^$account" assoc | cut -d' ' -f2 ;;
  *) cat "$3" ;;
esac | awk -F'|' -v OFS='|' -v n=$((commas + 1)) '{ $n = $n; print }'
"""
# Keeps the scripts, and the environment of the last call. Script N meets refuse-N, interrupt-N, or
# late-N: it is taken, but the answer is lost.
SBATCH = """
[[ $1 != --test-only ]] || exit 0
cp "$1" script-$(ls script-* 2>/dev/null | wc -l)
env >environment
number=$(ls script-* | wc -l)
if [[ -e refuse-$number ]]; then echo "sbatch: error: no way" >&2; exit 1; fi
if [[ -e late-$number ]]; then
  sed -n "s/^#SBATCH --comment=/$((100 + number))|/p" "$1" | tr -d "'" >>queue
  echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv" >&2; exit 1
fi
if [[ -e interrupt-$number ]]; then kill -$(<interrupt-$number) $PPID $$; fi
echo "Submitted batch job $((100 + number))"
"""
# The lines of queue-1, queue-2 ... in turn; then those of `queue`.
SQUEUE = """
echo "$@" >squeue-args
env >squeue-environment
first=$(ls queue-* 2>/dev/null | head -n 1)
cat "${first:-queue}"
[[ -z $first ]] || rm "$first"
"""
# As far as pending tasks go: they leave the queue at once.
SCANCEL = """
[[ ! -e refuse-scancel ]] || { echo "scancel: error: no" >&2; exit 1; }
ls ../out/hand/jobs/*.failed >notes-at-scancel 2>/dev/null
echo "$@" >>cancelled
for task; do sed -i "/^$task|/d" queue; done
"""


class FakeCluster:
    """One partition, `low`, from which tasks are requeued, and a second, `gpu`; no accounting.

    Args:
        folder: of the commands and of the files that they read and write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in {
            "sacctmgr": SACCTMGR, "sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL,
            "scontrol": '\ncat "$2"\n', "srun": "", "sacct": "\nexit 1\n",
        }.items():  # fmt: skip
            self.file(name, f'#!/bin/bash\ncd "$(dirname "$0")"{text}')
        self.file("queue", "")
        self.file("node", "NodeName=n1 NodeAddr=x NodeHostName=n1.site.org Version=22\n")
        self.settings(PreemptType="preempt/partition_prio", PreemptMode="REQUEUE")
        self.partition(PreemptMode="REQUEUE", GraceTime="40", QoS="N/A")

    def file(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def settings(self, **values: str) -> None:
        values = {"MaxArraySize": "500", "KillWait": "45 sec"} | values
        values |= {"AccountingStorageType": "accounting_storage/slurmdbd"}
        self.file("config", "".join(f"{name:24} = {value}\n" for name, value in values.items()))

    def partition(self, **values: str) -> None:
        values = {"PartitionName": "low", "Default": "YES", "State": "UP"} | values
        line = " ".join(f"{k}={v}" for k, v in values.items())
        self.file("partition", f"{line}\nPartitionName=gpu Default=NO State=UP\n")

    def accounting(self, assoc: str, qos: str) -> None:
        for name, text in {"user": "mine\n", "assoc": assoc, "qos": qos}.items():
            self.file(name, text)

    def queue(self, file: str = "queue", **tasks: str) -> None:
        """Given as t102_0="PENDING", or "PENDING|a reason"."""
        states = {name[1:]: f"{state}|x".split("|")[:2] for name, state in tasks.items()}
        lines = [f"{task}|{state}|{why}|0:00\n" for task, (state, why) in states.items()]
        self.file(file, "".join(lines))

    @property
    def cancelled(self) -> list[str]:
        return self.read("cancelled").split()

    @property
    def script(self) -> Path:
        """The newest that was submitted."""
        return max(self.folder.glob("script-*"))
