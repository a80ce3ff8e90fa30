"""Test a detector with the installed MMDetection's own tools/test.py: the same arguments, after a few checks."""

from framework_tool import run

if __name__ == '__main__':
    run('test.py')
