"""Point estimates of rewards, as the field uses them: each a function from demonstrations to a PointEstimate.

- :func:`maxent`: maximum entropy IRL, by likelihood or by its dual (feature matching), linear or neural rewards;
- :func:`max_margin`: apprenticeship learning (Abbeel and Ng 2004);
- :func:`maximum_margin_planning`: the structured margin (Ratliff, Bagnell and Zinkevich 2006);
- :func:`cloning`: imitation, which infers nothing;
- :func:`sample_gradient`, :func:`guided_cost`, :func:`adversarial`: maximum likelihood of the trajectory reading from a
  simulator alone, from plain sample gradients to guided cost learning and IRL as a GAN.
- :func:`airl`: adversarial IRL with networks for reward and policy, from a simulator alone.
"""

from pirl.baselines.adversarial import adversarial
from pirl.baselines.airl import airl
from pirl.baselines.cloning import cloning
from pirl.baselines.estimate import PointEstimate
from pirl.baselines.guided_cost import guided_cost, sample_gradient
from pirl.baselines.margin_planning import maximum_margin_planning
from pirl.baselines.max_margin import max_margin
from pirl.baselines.maxent import maxent

__all__ = [
    "PointEstimate",
    "adversarial",
    "airl",
    "cloning",
    "guided_cost",
    "max_margin",
    "maxent",
    "maximum_margin_planning",
    "sample_gradient",
]
