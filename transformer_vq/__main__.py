"""`python -m transformer_vq`, and the module that launchers start: `torchrun … -m transformer_vq train …`."""

from transformer_vq.cli import main

if __name__ == "__main__":
    main()
