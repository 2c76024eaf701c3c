"""The compiled library. Importing it registers ``torch.ops.rcp_kernels.*``; it has no Python names of its own."""
