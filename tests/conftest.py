import os
import tempfile

import torch

torch.set_num_threads(1)  # the tests share two cores with whatever else runs

# ultralytics writes settings into the user's folder when it is imported, and looks for the network
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics-"))
os.environ.setdefault("YOLO_OFFLINE", "true")
