from tests.hints import damaged, flags, folders
from tests.hints.case import CASES
TABLE=CASES
