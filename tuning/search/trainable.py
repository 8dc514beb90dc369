"""The Ray trainable: what Ray Tune sees of a worker. The driver, which sends it, loads no torch."""

import json
from typing import Any

from ray import tune

LAST_SENDING_SECONDS = 60.0  # for which a worker that is no longer needed retries to send its files


class FinetuneTrial(tune.Trainable):  # type: ignore[misc]
    """A trial as Ray sees it; later trials reuse its actor. A step returns {"row": JSON of the worker's row}."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        bundle = {"CPU": config["threads"]} | ({"GPU": config["gpus"]} if config["gpus"] else {})
        return tune.PlacementGroupFactory([bundle])

    def setup(self, config: dict[str, Any]) -> None:
        from tuning.search.worker import Worker

        self.worker = Worker(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.worker.next_trial(new_config)
        return True

    def step(self) -> dict[str, str]:
        return {"row": json.dumps(self.worker.step())}

    def cleanup(self) -> None:
        self.worker.end(LAST_SENDING_SECONDS)
