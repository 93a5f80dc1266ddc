"""The families: one file each, `config -> Spec` and `RULES`, found by `zoo.families`. Nothing else."""
