"""Train a detector with the installed MMDetection's own tools/train.py: the same arguments, after a few checks."""

from framework_tool import run

if __name__ == '__main__':
    run('train.py')
