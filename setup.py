"""What setup.cfg cannot express: configs/ and slurm/ are installed below bip/_files."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bip", "bip.*", "launch", "launch.*"]),
        "bip._files.configs",
        "bip._files.slurm",
    ],
    package_dir={"bip._files.configs": "configs", "bip._files.slurm": "slurm"},
)
