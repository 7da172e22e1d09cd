"""Reference classifiers, registered with timm by importing this module: ``timm.create_model("lvvit_s")`` then works.

VOLO is not here: timm has it.
"""

from distillkit.models import autospace as autospace
from distillkit.models import deepvit as deepvit
from distillkit.models import lvvit as lvvit
from distillkit.models import refiner as refiner
from distillkit.models import vip as vip
