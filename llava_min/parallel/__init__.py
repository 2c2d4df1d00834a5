"""Several processes that train one model: who takes part (ranks), and who holds what (fsdp)."""
