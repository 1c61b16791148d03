"""2:4 products by NVIDIA's cuSPARSELt, and the kernels that write the operands it multiplies."""
