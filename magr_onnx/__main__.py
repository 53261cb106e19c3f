"""``python -m magr_onnx``: the command line where its script is not on the path."""

from magr_onnx.cli.main import main

if __name__ == "__main__":  # processes that a run starts may import it
    main()
