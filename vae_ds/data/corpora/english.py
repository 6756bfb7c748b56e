"""Small word lists to distinguish sentences from fragments: complete closed classes, and common verbs of manuals."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _words(
    "a an the this that these those it its they them their he she his her we our you your i my is are was were be"
    " been being has have had do does did can could will would shall should may might must not no nor and or but if"
    " then than when where which who whom whose what how why while because so as at by for from in into of off on"
    " onto out over to up down with within without between through during before after above below under again once"
    " here there all any both each few more most other some such only own same too very also one two whether since"
    " until unless although though however otherwise"
)
DETERMINERS = _words("the a an this that these those all any each every its their his her your our")
SUBORDINATE = _words(
    "if when while because since unless although though whether until where whenever after before as once"
)
NEVER_LAST = _words("the a an and or of is are than")
# "List of names." is a fragment, "Most of the names are short." is not.
PARTITIVE = _words("most some all one each none many much half any neither either both because instead out two three")
# Openings of parameter descriptions that lack a subject.
NO_SUBJECT = _words(
    "whether must can may should will would could used called raised default defaults optional true false none is"
    " are was has does doesn't which that who and or but given"
)
VERBS_BASE = _words(
    "accept access acquire activate adapt add adjust allocate allow alter analyze append apply approximate ask"
    " assemble assert assign assume attach attempt authenticate avoid begin bind block break broadcast build cache"
    " calculate call cancel capture carry cast catch change check choose clean clear click clip clone close coerce"
    " collect combine come compare compile complete compose compress compute concatenate configure confirm connect"
    " consider construct consult consume contain continue contribute control convert copy correspond count cover"
    " create cut deallocate debug decide declare decode decompose decompress decorate decrease decrypt define"
    " delegate delete deliver denote depend deprecate derive describe deserialize destroy detach detect determine"
    " differ disable discard disconnect dispatch display distribute divide do download draw drop dump duplicate edit"
    " eliminate embed emit emulate enable encode encourage encrypt end enforce ensure enter enumerate escape"
    " establish estimate evaluate examine exclude execute exist exit expand expect explain expose express extend"
    " extract fail feed fetch fill filter find finish fit fix flatten flip flush fold follow force format forward"
    " free freeze fuse gather generate get give go group grow guarantee guess handle happen help hide highlight hold"
    " identify ignore implement import improve include increase increment indicate infer inform inherit initialize"
    " inject insert inspect install instantiate integrate intend interact interpolate interpret introduce invert"
    " invoke involve issue iterate join jump keep kill know launch lead leave let lie lift link list listen load"
    " locate lock log look lookup lower make manage map mark mask match mean measure merge migrate mirror modify"
    " monitor move multiply need normalize note notify obtain occur offer open operate optimize order organize"
    " output override overwrite own pack pad parse partition pass patch perform permute pick place plot point poll"
    " pop populate position post precompute predict prefer prepare preprocess present preserve press prevent print"
    " proceed process produce project promote prompt propagate protect prove provide prune publish pull push put"
    " query quit quote raise randomize reach read rearrange receive recommend reconstruct record recover recursively"
    " reduce refer reflect refresh register reject relate release reload remain remember remove rename render"
    " reorder repeat replace replicate report represent request require reserve reset reshape resize resolve respect"
    " respond restart restore restrict result resume retrieve return reverse revert rewrite roll rotate round run"
    " sample save scale scan schedule search see select send separate serialize serve set setup share shift show"
    " shuffle shut signal simplify simulate skip slice solve sort specify split stand start stop store strip"
    " subclass submit substitute subtract suggest sum summarize support suppose suppress swap switch synchronize"
    " take tell terminate test throw tie toggle tokenize trace track train transfer transform translate transpose"
    " traverse treat trigger trim truncate try tune turn uninstall unpack unregister unset unwrap update upgrade"
    " upload use validate verify visit wait walk want warn watch work wrap write yield zero zip"
)


def _third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


_THIRD = frozenset(_third_person(verb) for verb in VERBS_BASE)
_NOUNS_TOO = _words(
    "accesses adds attempts blocks breaks builds calls casts changes checks comes controls copies counts covers"
    " cuts displays draws drops dumps ends estimates exits feeds fits fixes forces formats groups helps holds"
    " imports issues jumps joins keys leads lets lies lifts links lists loads locks logs looks maps marks masks"
    " matches means measures merges monitors moves needs notes offers opens orders outputs overrides pads passes"
    " patches picks places plots points pops positions posts processes produces projects prompts proves pulls pushes"
    " quotes queries ranges records reports requests resets results returns reverses rolls rounds runs samples saves"
    " scales searches sees sets setups shares shifts shows signals slices sorts splits stands starts stops stores"
    " strips subclasses sums supports swaps switches tests ties traces tracks trains transfers transforms tries"
    " turns updates uses values visits walks wants warns watches works wraps writes yields zeros zips caches clones"
    " clips compares filters releases repeats triggers downloads uploads embeds edits increases decreases"
)
_SURE_THOUGH_NOUNS = _words(
    "adds returns produces shows supports needs means uses sets takes makes gives wants works calls helps lets sees"
    " holds tries yields wraps warns writes proves comes stands compares"
)
AUXILIARIES = _words(
    "is are was were has have had do does did can could will would shall should may might must cannot isn't aren't"
    " wasn't weren't hasn't haven't doesn't don't didn't can't couldn't won't wouldn't shouldn't mustn't it's that's"
    " there's we're you're they're i'm let's we'll you'll it'll they'll i'll we've you've we you they i became"
    " becomes seems appears tends"
)
VERBS = VERBS_BASE | _THIRD | {"let's", "please", "recursively", "automatically", "lazily", "asynchronously"}
FINITE = AUXILIARIES | (_THIRD - _NOUNS_TOO) | _SURE_THOUGH_NOUNS
