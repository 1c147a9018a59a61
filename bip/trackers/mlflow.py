"""MLflow. MLFLOW_TRACKING_URI names the server; without it all is below RESULT_DIR/mlruns.

`mlflow ui --backend-store-uri RESULT_DIR/mlruns` shows these files.

A run folder has one MLflow run.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from bip.trackers import base

_BATCH = 1000  # metrics and 100 parameters are the most that a server takes at once


class Tracker(base.Tracker):
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        super().__init__(folder, config, step)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        files = (Path(config["result_dir"]).absolute() / "mlruns").as_uri()
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", files))
        if (known := self.remembered()) is not None:
            self.run_id = known
            self.client.update_run(known, "RUNNING")
            return
        experiment = self._experiment(config["exp_name"])
        self.run_id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        self.remember(self.run_id)
        values = [Param(name, str(value)) for name, value in config.items()]
        for at in range(0, len(values), 100):
            self.client.log_batch(self.run_id, params=values[at : at + 100])

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # another run was faster
                return str(self.client.create_experiment(name))
            found = self.client.get_experiment_by_name(name)
        assert found is not None
        return str(found.experiment_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for at in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[at : at + _BATCH])

    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        if result is not None:
            numbers = {f"result/{k}": float(v) for k, v in result.items() if _is_number(v)}
            self.log(0, numbers)
        ended = "FINISHED" if result is not None else "KILLED" if stopped else "FAILED"
        self.client.set_terminated(self.run_id, ended)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
