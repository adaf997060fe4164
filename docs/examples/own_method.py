"""A method of your own: the network runs on every n-th evaluation, and its last prediction is used in between."""

from typing import Any, ClassVar

from pydantic import Field

import diffaccel
from diffaccel import Recipe
from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.cache_plan import Seen
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap


@register
class Hold(Method):
    """Call the network on every `interval`-th evaluation only, and answer with its last prediction in between.

    Attributes:
        interval: one evaluation in so many is computed. Off: 1.
    """

    name: ClassVar[str] = "hold"
    layer: ClassVar[Layer] = Layer.STEP

    interval: int = Field(default=2, ge=1)

    @property
    def is_off(self) -> bool:
        return self.interval == 1

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        run.around("denoiser", Layer.STEP, _Held(self, run).around)


class _Held:
    """What one run keeps: the last prediction of each network call, and the inputs it was made from."""

    def __init__(self, config: Hold, run: Run) -> None:
        self.config, self.run = config, run
        self.outputs: dict[Any, Any] = {}
        self.seen: dict[Any, Seen] = {}

    def around(self, call: Call, proceed: Proceed) -> Any:
        due = self.run.clock.evaluation % self.config.interval == 0
        if due or call.lane not in self.outputs or not self.seen[call.lane].same(call):
            self.outputs[call.lane], self.seen[call.lane] = proceed(call), Seen.of(call)
            self.run.count(self.config.name, computed=1)
        else:
            self.run.skip("denoiser", call, self.config.name)
            self.run.count(self.config.name, held=1)
        return self.outputs[call.lane]


pipe = diffaccel.load_miniature("shapes-sd")
fast = diffaccel.wrap(pipe, [Hold(interval=3), diffaccel.GuidanceInterval(stop_fraction=0.5)])
image = fast("a red square", num_inference_steps=20).images[0]
print(fast.report)

fast.recipe.save("hold.json")  # a registered method can be read from recipe files
assert Recipe.load("hold.json") == fast.recipe
