"""The experiments of the DPO paper (arXiv 2305.18290) at small size, on texts that install with packages."""
