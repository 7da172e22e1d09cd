import os
import tempfile

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the tests share two cores with whatever else runs

# ultralytics writes settings into the user's folder when it is imported, and looks for the network
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics-"))
os.environ.setdefault("YOLO_OFFLINE", "true")

OPENS = Image.open


@pytest.fixture(autouse=True)
def _pillow_as_it_is():
    """ultralytics replaces Pillow's ``open`` when it is imported, and says other things of broken pictures."""
    Image.open = OPENS
    yield
    Image.open = OPENS
