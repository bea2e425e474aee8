# Run by the agent as root in the lab host: KVM, and one virtual function per NIC for VFIO.
# Arguments: the root and the version of the kernel's modules. Prints the environment of commands.
set -eu
load() { modprobe -d "$1" -S "$2" "$3"; }
for module in kvm_amd kvm_intel; do load "$1" "$2" $module 2>/dev/null || true; done
load "$1" "$2" vfio-pci
load "$1" "$2" igb
# From here on no driver takes a function unasked: the virtual functions are for VFIO.
echo 0 > /sys/bus/pci/drivers_autoprobe
ip link set lo up
index=0
for nic in /sys/bus/pci/drivers/igb/0000:*; do
    [ -e "$nic/sriov_numvfs" ] || continue
    netdev=$(ls "$nic/net")
    echo 1 > "$nic/sriov_numvfs"
    ip link set "$netdev" up
    echo "PF$index=$netdev"
    index=$((index + 1))
done
ip address add 10.7.0.1/24 dev eth0
index=0
for nic in /sys/bus/pci/drivers/igb/0000:*; do
    [ -e "$nic/virtfn0" ] || continue
    netdev=$(ls "$nic/net")
    tries=0
    until [ "$(cat "/sys/class/net/$netdev/carrier")" = 1 ]; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || { echo "$netdev got no link" >&2; exit 1; }
        sleep 0.1
    done
    ip link set "$netdev" vf 0 mac "52:54:00:07:00:1$index"
    function=$(basename "$(readlink "$nic/virtfn0")")
    echo vfio-pci > "/sys/bus/pci/devices/$function/driver_override"
    echo "$function" > /sys/bus/pci/drivers_probe
    echo "VF$index=$function"
    index=$((index + 1))
done
echo PEER_IP=10.7.0.1
