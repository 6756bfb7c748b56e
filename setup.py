"""Packaging of vae_ds. Version ranges stand here, exact pins in launchers/constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="vae_ds",
    version="0.2.0",
    description="Turn a pretrained T5 into a text VAE by finetuning alone, on DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["vae_ds", "vae_ds.*"]), "vae_ds.ds_configs"],
    # ds_configs/ stands at the top level, where DeepSpeed users look for it, and inside the package in a wheel.
    package_dir={"vae_ds.ds_configs": "ds_configs"},
    package_data={
        "vae_ds": ["tiny/*", "tiny_vae/*"],
        "vae_ds.config": ["recipes/*.yaml", "studies/*.yaml"],
        "vae_ds.ds_configs": ["*.json"],
        "vae_ds.inspection": ["page.html"],
        "vae_ds.studies.published": ["*.csv"],  # the numbers that papers print
    },
    entry_points={"console_scripts": ["vae-ds = vae_ds.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",  # the T5 that is finetuned
        "deepspeed>=0.19.8,<0.20",  # a minor release moves what the engine relies on
        "datasets>=4",  # Arrow caches of token ids; hub and local data sets
        "tensorboard>=2.15",
        "sentencepiece>=0.2",  # T5 tokenizers: trained and read as SentencePiece models
        "protobuf",  # transformers reads a SentencePiece model through it
        "safetensors>=0.5",
        "numpy>=2",
        "pydantic>=2.7",  # strict recipes
        "pyyaml>=6",
        "sacrebleu>=2.4",  # BLEU, with the signature that says how it was counted
        "matplotlib>=3.9",  # the figures of a report
        "pillow>=10",  # a report's PNG with few colours, small enough for a README
        "argcomplete>=3",  # completion of commands in the shell
        "rich>=13",  # tables and the training's progress bar
        "tqdm>=4.66",  # progress bars of the data's preparation
        "pyarrow>=15",  # the files that datasets writes and reads
        "huggingface_hub>=1",  # looks at a base's configuration before its weights are fetched
        "setuptools>=77",  # torch and DeepSpeed compile their operators through it
        "psutil>=5.9",  # launchers: the processes of a job
        "packaging>=23",  # launchers: what an environment already has
    ],
    extras_require={
        "lora": ["peft>=0.21,<1"],  # adapters (model.lora)
        "wandb": ["wandb>=0.20"],  # Weights & Biases (logging.trackers)
        "mlflow": ["mlflow-skinny>=3"],  # MLflow's client (logging.trackers)
        "look": ["scikit-learn>=1.5,<2", "umap-learn>=0.5.7,<1"],  # classifiers of probes, maps
        "mauve": ["mauve-text>=0.4,<1"],  # MAUVE of samples (evaluation.mauve)
        "formats": ["onnx>=1.17", "onnxscript>=0.5", "sentence-transformers>=5"],  # the encoder in other programs
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "selenium>=4.25",
            # what the extras bring
            "peft>=0.21,<1",
            "wandb>=0.20",
            "mlflow-skinny>=3",
            "scikit-learn>=1.5,<2",
            "umap-learn>=0.5.7,<1",
            "mauve-text>=0.4,<1",
            "onnx>=1.17",
            "onnxscript>=0.5",
            "sentence-transformers>=5",
        ],
        "dev": ["ruff>=0.9", "mypy>=1.13", "types-PyYAML"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2", "ruff>=0.9"],
    },
)
