"""Run folders in; data frames, statistics, figures and one HTML report out.

`load_study(path)` reads the files, `summarize(study)` is the table of arms, `claims_table(study)`
the verdicts on the GSPO paper's claims, and `write_report(path)` draws everything again from files.
Needs pandas, numpy and matplotlib; never torch, transformers or the trainer.
"""

from moe_rl.analysis.data.load import AnalysisError, AnalysisWarning, StudyRuns, load_study
from moe_rl.analysis.data.measures import run_measures, summarize, terminal_table
from moe_rl.analysis.report.report import write_report
from moe_rl.analysis.verdicts.claims import claims_table, open_claims, terminal_verdicts

__all__ = [
    "AnalysisError",
    "AnalysisWarning",
    "StudyRuns",
    "claims_table",
    "load_study",
    "open_claims",
    "run_measures",
    "summarize",
    "terminal_table",
    "terminal_verdicts",
    "write_report",
]
