# The CUDA part of lora_fused._C: every .cu and .cpp below csrc/cuda, where an nvcc is found.
#
#   LORA_FUSED_CUDA=AUTO|ON|OFF    AUTO: where nvcc is found; ON: an error where it is not
#   LORA_FUSED_CUDA_ARCH_LIST      as TORCH_CUDA_ARCH_LIST: "8.0;9.0a;12.0+PTX", or "all"
#   LORA_FUSED_NVCC                this nvcc and no other
#
# Each may be given to CMake or stand in the environment. nvcc is looked for on the PATH, in CUDA_HOME, in
# /usr/local/cuda and then in PyPI's compiler wheels (the extra cuda-build).
#
# NOTE: nvcc is called by custom commands and not through CMake's language CUDA: that one ends the whole
# configuration where a compiler does not work, and does not find the libraries in the wheels' layout.

# NOTE: in the cache, so that a later `cmake --build` in another environment builds the same.
function(lora_fused_setting name default)
  set(${name} "" CACHE STRING "see csrc/cuda/build.cmake")
  if("${${name}}" STREQUAL "")
    if("$ENV{${name}}" STREQUAL "")
      set(${name} "${default}" CACHE STRING "" FORCE)
    else()
      set(${name} "$ENV{${name}}" CACHE STRING "" FORCE)
    endif()
  endif()
endfunction()

function(lora_fused_find_nvcc result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
    OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(wheels)
  foreach(package IN LISTS packages)
    file(GLOB found ${package}/cu*/bin)
    list(APPEND wheels ${found})
  endforeach()
  unset(nvcc)
  find_program(nvcc nvcc NO_CACHE NO_DEFAULT_PATH PATHS $ENV{CUDACXX} ENV PATH)
  find_program(nvcc nvcc NO_CACHE NO_DEFAULT_PATH
    PATHS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin ${wheels})
  if(NOT nvcc)
    set(nvcc "")
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# The toolkit's root, by what nvcc itself says: the file on the PATH may be a wrapper.
function(lora_fused_toolkit_of nvcc root)
  execute_process(COMMAND ${nvcc} --dryrun -E -x cu /dev/null ERROR_VARIABLE says OUTPUT_QUIET)
  string(REGEX MATCH "#\\$ TOP=([^\n]*)" _ "${says}")
  get_filename_component(top "${CMAKE_MATCH_1}" REALPATH)
  set(${root} "${top}" PARENT_SCOPE)
endfunction()

# "8.0;9.0a+PTX" to flags: `all` for kernels of every target, `hopper` for those that need sm_90a alone, `mma` for
# the matmul by mma.sync, which nothing chooses on sm_90 to sm_110: no machine code for these. Targets below sm_80
# and those that this nvcc does not know are left out.
function(lora_fused_arch_flags nvcc arch_list all hopper mma)
  if(arch_list STREQUAL "all")
    set(arch_list "8.0;8.6;8.9;9.0a;9.0+PTX;10.0;12.0")
  endif()
  string(REGEX REPLACE "[ ,]+" ";" arch_list "${arch_list}")
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REPLACE "\n" ";" known "${known}")
  set(flags)
  set(hopper_flags)
  set(mma_flags)
  foreach(arch IN LISTS arch_list)
    string(REGEX MATCH "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$" matched "${arch}")
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    set(feature "${CMAKE_MATCH_3}")
    set(ptx "${CMAKE_MATCH_4}")
    if(NOT matched)
      message(FATAL_ERROR
        "LORA_FUSED_CUDA_ARCH_LIST: got ${arch}, expected targets like 8.0, 9.0a or 12.0+PTX")
    endif()
    if(number LESS 80 OR NOT "compute_${number}" IN_LIST known)
      message(STATUS "lora_fused: CUDA target ${arch} left out: below 8.0 or unknown to this nvcc")
      continue()
    endif()
    if(NOT number EQUAL 90)
      set(feature "")  # only the Hopper kernels use architecture-specific instructions
    endif()
    if(NOT (number EQUAL 90 AND ptx AND "9.0a" IN_LIST arch_list))
      list(APPEND flags "-gencode=arch=compute_${number}${feature},code=sm_${number}${feature}")
    endif()
    if(number LESS 90 OR NOT number LESS 120)
      list(APPEND mma_flags "-gencode=arch=compute_${number},code=sm_${number}")
    endif()
    if(ptx)
      list(APPEND flags "-gencode=arch=compute_${number},code=compute_${number}")
      list(APPEND mma_flags "-gencode=arch=compute_${number},code=compute_${number}")
    endif()
    if(number EQUAL 90)
      set(hopper_flags "-gencode=arch=compute_90a,code=sm_90a")
    endif()
  endforeach()
  if(NOT flags)
    message(FATAL_ERROR "lora_fused: no CUDA target is left of ${arch_list}")
  endif()
  if(NOT mma_flags)
    set(mma_flags "-gencode=arch=compute_80,code=compute_80")  # the launchers name these kernels
  endif()
  list(REMOVE_DUPLICATES flags)
  list(REMOVE_DUPLICATES mma_flags)
  set(${all} "${flags}" PARENT_SCOPE)
  set(${hopper} "${hopper_flags}" PARENT_SCOPE)
  set(${mma} "${mma_flags}" PARENT_SCOPE)
endfunction()

function(lora_fused_compile_cuda nvcc source flags result)
  file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${source})
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  get_filename_component(directory ${object} DIRECTORY)
  file(MAKE_DIRECTORY ${directory})
  add_custom_command(OUTPUT ${object}
    COMMAND ${nvcc} -c -std=c++17 -O3 --threads 2 -ccbin ${CMAKE_CXX_COMPILER}
            -Xcompiler=-fPIC,-fvisibility=hidden ${flags} -MD -MF ${object}.d -o ${object} ${source}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc ${name}" VERBATIM)
  set(${result} ${object} PARENT_SCOPE)
endfunction()

lora_fused_setting(LORA_FUSED_CUDA AUTO)
lora_fused_setting(LORA_FUSED_NVCC "")
set(default_arch_list "all")
if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  set(default_arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
lora_fused_setting(LORA_FUSED_CUDA_ARCH_LIST "${default_arch_list}")

if(LORA_FUSED_CUDA STREQUAL "OFF" OR LORA_FUSED_SANITIZE)
  return()
endif()
if(NOT LORA_FUSED_NVCC)
  lora_fused_find_nvcc(LORA_FUSED_NVCC)
endif()
if(NOT LORA_FUSED_NVCC)
  if(LORA_FUSED_CUDA STREQUAL "ON")
    message(FATAL_ERROR "lora_fused: no nvcc on the PATH, in CUDA_HOME, in /usr/local/cuda or in the wheels "
      "of the extra cuda-build")
  endif()
  message(STATUS "lora_fused: no nvcc found; the CUDA kernels are left out")
  return()
endif()

lora_fused_toolkit_of(${LORA_FUSED_NVCC} cuda_root)
find_path(cuda_include cuda_runtime_api.h NO_CACHE REQUIRED NO_DEFAULT_PATH
  PATHS ${cuda_root}/include ${cuda_root}/targets/x86_64-linux/include ${cuda_root}/targets/sbsa-linux/include)
find_library(cuda_runtime cudart_static NO_CACHE REQUIRED NO_DEFAULT_PATH
  PATHS ${cuda_root}/lib64 ${cuda_root}/lib ${cuda_root}/targets/x86_64-linux/lib
        ${cuda_root}/targets/sbsa-linux/lib)
lora_fused_arch_flags(${LORA_FUSED_NVCC} "${LORA_FUSED_CUDA_ARCH_LIST}" cuda_flags cuda_hopper_flags
  cuda_mma_flags)
message(STATUS "lora_fused: CUDA kernels by ${LORA_FUSED_NVCC} for ${LORA_FUSED_CUDA_ARCH_LIST}")

file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB_RECURSE cuda_host_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp)
set(cuda_objects)
foreach(source IN LISTS cuda_sources)
  set(flags ${cuda_flags})
  if(source MATCHES "/sm90/")
    set(flags ${cuda_hopper_flags})
  elseif(source MATCHES "/sm80/")
    set(flags ${cuda_mma_flags})
  endif()
  if(flags)
    lora_fused_compile_cuda(${LORA_FUSED_NVCC} ${source} "${flags}" object)
    list(APPEND cuda_objects ${object})
  endif()
endforeach()

add_library(cuda_host OBJECT ${cuda_host_sources} ${cuda_objects})
target_include_directories(cuda_host SYSTEM PRIVATE ${cuda_include})
if(cuda_hopper_flags)
  target_compile_definitions(cuda_host PRIVATE LORA_FUSED_HAVE_SM90)
endif()
target_link_libraries(cuda_host PRIVATE options pybind11::module)
target_sources(_C PRIVATE $<TARGET_OBJECTS:cuda_host> ${cuda_objects})
target_compile_definitions(_C PRIVATE LORA_FUSED_HAVE_CUDA)
target_link_libraries(_C PRIVATE ${cuda_runtime} ${CMAKE_DL_LIBS} rt Threads::Threads)
target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)

# The same objects on a runtime that records calls instead of a GPU's: what tests/cuda/test_host.py drives.
set(fake_runtime ${PROJECT_SOURCE_DIR}/tests/cuda/fake_runtime.cpp)
if(EXISTS ${fake_runtime})
  pybind11_add_module(fake_cuda MODULE NO_EXTRAS EXCLUDE_FROM_ALL ${fake_runtime}
    $<TARGET_OBJECTS:cuda_host> ${cuda_objects})
  target_include_directories(fake_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc/cuda)
  target_include_directories(fake_cuda SYSTEM PRIVATE ${cuda_include})
  target_link_libraries(fake_cuda PRIVATE options Threads::Threads)
  set_target_properties(fake_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fake)
endif()
