# Writes model files into a folder, then loads each file that is named on standard input, and prints
# how many seconds BSON.jl took. julia opening.jl BSONJL FOLDER; see opening.py.

include(joinpath(ARGS[1], "src", "BSON.jl"))
using .BSON

struct Dense
    weight::Array{Float32,2}
    bias::Array{Float32,1}
    activation::Any
end

struct Conv
    activation::Any
    weight::Array{Float32,4}
    bias::Array{Float32,1}
    stride::Tuple
    pad::Tuple
    dilation::Tuple
end

struct Chain
    layers::Tuple
end

layers(functions) = [Dense(randn(Float32, 512, 512), randn(Float32, 512), f) for f in functions]

function convolutions(channels)
    pairs = zip(channels, channels[2:end])
    [Conv(tanh, randn(Float32, 3, 3, from, to), randn(Float32, to), (1, 1), (1, 1, 1, 1), (1, 1)) for (from, to) in pairs]
end

short(number) = eval(:(x -> reshape(x .+ $(Float64(number)), :, size(x, 4))))

function long(statements)
    body = quote y = x end
    for number in 1:statements
        push!(body.args, :(y = tanh.(y .* $(Float64(number)) .+ sin(y[1] + $number))))
    end
    push!(body.args, :(return y))
    eval(:(x -> $body))
end

models = [
    "matrix" => randn(Float32, 1024, 2000),
    "structs" => Chain(Tuple(layers(fill(tanh, 8)))),
    "convolutions" => Chain(Tuple(convolutions([3, 64, 64, 128, 128, 128, 256, 256, 256]))),
    "many" => Chain(Tuple([Dense(randn(Float32, 32, 32), randn(Float32, 32), tanh) for _ in 1:1900])),
    "long" => Chain(Tuple(layers([long(120) for _ in 1:8]))),
    "short" => Chain(Tuple([short(number) for number in 1:400])),
]
for (name, model) in models
    BSON.bson(joinpath(ARGS[2], name * ".bson"), Dict(:model => model))
end
println(VERSION)

for path in eachline(stdin)
    BSON.load(path, Main)
    GC.gc()
    println(@elapsed BSON.load(path, Main))
end
