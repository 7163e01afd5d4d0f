import sys

from jmae.data.prepare import main
from jmae.errors import exit_code

sys.exit(exit_code(main))
