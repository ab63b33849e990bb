"""What gpu_check.py is made of: the driver, its double, kernels, JAX programs and the items."""
