"""What heads of fine-tuning are made of, for more than one script or too long for one."""
