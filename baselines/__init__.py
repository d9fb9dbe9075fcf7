"""Published backbones behind the contract of the evaluations: one loader file per family."""
