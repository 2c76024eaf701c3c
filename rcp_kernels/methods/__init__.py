"""Methods that make a quantized model of a float one. They work on models; what runs is in ``nn`` and ``ops``."""
