"""MaxEnt RL with deep networks: Stable-Baselines3's PPO and SAC behind :meth:`StableBaselines.improve`.

The objective is reward plus entropy, at temperature alpha,

    max_pi E sum_t g^t [r(s_t, a_t) - alpha log pi(a_t|s_t)],

whose optimum is pi(a|s) proportional to exp(Q(s,a) / alpha). SAC has it as its own (a fixed entropy coefficient). PPO
is given r - alpha log pi(a|s) as the reward, with pi the policy that acted: since E grad log pi = 0, the policy
gradient of that reward, held fixed, is the gradient of the objective. (PPO's own entropy bonus is another objective:
it counts the entropy of this decision and not that of those to come.)

This module needs the extra ``rl``; ``import pirl`` never imports it.
"""

from pirl.errors import MissingDependencyError

try:
    import stable_baselines3  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("stable_baselines3", "gymnasium"):  # installed, and broken: its own error tells more
        raise
    raise MissingDependencyError("stable-baselines3 is not installed: pip install 'pirl[rl]'") from None

from pirl.stable_baselines.copies import Transitions
from pirl.stable_baselines.learner import DeepPolicy, StableBaselines

__all__ = ["DeepPolicy", "StableBaselines", "Transitions"]
