"""Read by Python as it starts, where PYTHONPATH names this folder: for scripts that a launcher starts."""

from accelerate_on_cpus import pass_for_gpus

pass_for_gpus()
