"""Names of the files in an adapter folder. Unlike `adapter_io`, this module does not import torch."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SETTINGS_FILE = "softprompt.json"
CARD_FILE = "README.md"
