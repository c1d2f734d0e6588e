"""Parameter-efficient methods other than LoRA: what each trains, holds and keeps. One rule per method of PEFT."""
