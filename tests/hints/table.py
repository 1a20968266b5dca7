from tests.hints import ailments, damaged, flags, folders
from tests.hints.case import CASES
TABLE=CASES
