"""A model of the time that a W4A8 linear takes on a GPU, and the bounds it is compared with. Modelled, never measured.

python -m fptq_export.roofline   writes plugins/ROOFLINE.md
"""

from fptq_export.roofline.devices import DEVICES, Device
from fptq_export.roofline.instructions import Scheme, Tile
from fptq_export.roofline.model import Breakdown, Shape, bound_s, time_s

__all__ = ["DEVICES", "Breakdown", "Device", "Scheme", "Shape", "Tile", "bound_s", "time_s"]
