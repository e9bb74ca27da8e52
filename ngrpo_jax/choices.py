"""Choices and bounds that settings share with other rooms. Plain Python: a grading process imports this.

The method's own choices (strategies, metrics of nearness, algorithms, KL estimators) are the keys of the
dicts in `algo/`, where each has its function.
"""

WARM_START = "warm-start"  # the model.path of a model that the run makes itself

DTYPES = ("float32", "bfloat16")
PROMPTS = ("math", "choice", "plain")  # data.prompt: the sentence that follows a problem
LAYOUTS = ("tensor", "replicated")  # rollout.layout
AGGREGATES = ("sequence", "token", "constant")  # objective.aggregate
OVERLONG = ("keep", "mask", "penalize")  # objective.overlong
QUANTIZATIONS = ("int8",)  # rollout.quantize
DECODE_ATTENTION = ("auto", "plain", "ring")  # rollout.attention
OLD_LOGPROBS = ("learner", "sampler")  # objective.old_logprobs
LORA_SCALINGS = ("standard", "rslora")  # lora.scaling
LORA_INITS = ("uniform", "gaussian")  # lora.init
SCHEDULES = ("constant", "linear", "cosine", "wsd")  # optimizer.schedule
REMAT = ("none", "full", "dots")  # train.remat
ATTENTION = ("auto", "plain", "chunked", "cudnn", "splash")  # train.attention
OFFLOAD = ("none", "optimizer", "reference", "both")  # train.offload
BEST_METRICS = ("mean_at_n", "pass_at_k", "maj_at_n")  # of an evaluation; larger is better

LEAST_GRADER_MB = 128  # MiB of a grading process; math-verify takes about 70
