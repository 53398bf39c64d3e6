"""Names of the files that an adapter folder holds; apart from `adapter_io`, so that settings do not load torch."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SETTINGS_FILE = "softprompt.json"
CARD_FILE = "README.md"
