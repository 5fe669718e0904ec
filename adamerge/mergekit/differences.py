"""Where a merge by a mergekit file is not mergekit's, by design: sentences for the notes of a job."""

KEYED = (
    "random masks are drawn for (seed, model, tensor): mergekit's depend on the order in which tensors are read, so "
    "other entries are dropped"
)
EQUAL = "of entries of equal magnitude, of which not all can be kept, the first are: mergekit leaves it to torch which"
#: For methods that elect signs and divide by negative weights.
NEGATIVE = (
    "negative weights count by their magnitude in the divisor: mergekit divides by their sum, which undoes the sign of "
    "entries that they alone have kept"
)
COLUMN = "the only entry of a row is kept with the chance `density`: mergekit fails on tensors with one column"
ZERO = "tensors that are zero in one of the models are interpolated on a line: mergekit takes them for perpendicular"
LINE = (
    "the merge lies between the base and the mean of the models, and small task vectors have exact cosines: mergekit "
    "leaves that line where cosines are negative, and divides by no less than 1e-6"
)
ENERGY = (
    "models weigh by their energy however small it is: mergekit weighs them equally where mean squares sum to less "
    "than 1e-6"
)
SELECTED = (
    "of every tensor at least one entry is selected, and all that vary as much as the last of them: mergekit selects "
    "exactly select_topk of those that vary, rounded down"
)
EXPERTS = (
    "tensors of a mixture's experts are merged one by one, under the names that they have in the files: mergekit joins "
    "those of a layer under the names of transformers, which its filters then see"
)
